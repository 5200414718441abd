"""MLflow as a view of the result files; a cell as a file that needs none of our code, or as a served model."""

from longtail.tracking.runs import location, open_store, track

__all__ = ["location", "open_store", "track"]
