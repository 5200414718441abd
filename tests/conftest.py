import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# Workers beside each other share the cores: threads that wait for each other cost more than they bring. Before torch.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# The same examples each time: a suite that fails one time in a hundred says nothing about the change at hand.
# To look for new ones: HYPOTHESIS_PROFILE=default pytest.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Files of minutes come first: pytest-xdist begins with those of many tests, and the last worker ends alone.
LONG = ("large_pipeline", "pipeline", "benchmarks", "adopt", "streaming", "verify", "incremental")


def pytest_collection_modifyitems(items):
    """The order of files, for workers that take a file at a time; within a file nothing moves."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No test logs to anybody's MLflow or reads anybody's mirror unless it says so."""
    for name in ("MLFLOW_TRACKING_URI", "LONGTAIL_MIRROR", "LONGTAIL_DEVICE", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "off")
