from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No test logs to anybody's MLflow or reads anybody's mirror unless it says so."""
    for name in ("MLFLOW_TRACKING_URI", "LONGTAIL_MIRROR", "LONGTAIL_DEVICE", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "off")
