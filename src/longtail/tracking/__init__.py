"""MLflow as a view of the result files; a cell as a file that needs none of our code, or as a served model."""
