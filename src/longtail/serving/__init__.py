"""What a trained cell becomes outside the pipeline: a file, and a model that MLflow serves."""
