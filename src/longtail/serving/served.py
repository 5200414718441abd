"""What MLflow serves of a registered cell; MLflow keeps a copy of this file, and one of longtail.data.decode, which
need nothing else of longtail.

In: a column `image`, the bytes of an image file (PNG, JPEG, ...; base64 in JSON); or, of heads on somebody's own
embeddings, a column `features`, a list of numbers. Out, for each: the most probable class, and the probability of every
class by its name.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

try:
    from longtail.data import decode
except ImportError:  # where it is served: MLflow keeps a copy of that file beside this one's
    import decode  # type: ignore[import-not-found,no-redef]


class Served(PythonModel):
    """The exported network behind MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Open the network and what is known about it."""
        self.session = onnxruntime.InferenceSession(context.artifacts["network"], providers=["CPUExecutionProvider"])
        self.about = json.loads(Path(context.artifacts["about"]).read_text())

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Classify image files, decoded, cut and scaled as the pipeline does with its own; or features.

        Raises ValueError naming the row that holds no image, another number of features, or one that is no number.
        """
        (takes,) = (one.name for one in self.session.get_inputs())
        if takes == "images":
            given = np.stack([self.decode(row, data) for row, data in enumerate(model_input["image"])])
        else:
            given = np.stack([self.numbers(row, values) for row, values in enumerate(model_input["features"])])
        (probabilities,) = self.session.run(["probabilities"], {takes: given})
        classes = self.about["classes"]
        return [
            {"class": classes[int(row.argmax())], "probabilities": dict(zip(classes, row.tolist(), strict=True))}
            for row in probabilities
        ]

    def numbers(self, row: int, values: Any) -> np.ndarray:
        """A list of numbers as float32 (1, 1, D)."""
        width = self.about["channels"]
        try:
            found = np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"row {row}: features that are no list of numbers ({error})") from error
        if found.shape != (width,):
            raise ValueError(f"row {row}: features of shape {found.shape}, not ({width},)")
        if not np.isfinite(found).all():
            raise ValueError(f"row {row}: features that are not finite")
        return found.reshape(1, 1, -1)

    def decode(self, row: int, data: bytes) -> np.ndarray:
        """The bytes of a file as uint8 (H, W, channels)."""
        how = {key: self.about[key] for key in ("size", "channels", "fit", "exif_orientation")}
        try:
            return decode.decode(data, **how)[0]
        except ValueError as error:
            raise ValueError(f"row {row}: no image file ({error})") from error


set_model(Served())
