"""Take a picture of MLflow's page for a plan: docs/mlflow-runs.png.

    longtail track
    python docs/mlflow_picture.py --plan quick

Starts `mlflow server` on the store of the current folder (MLFLOW_TRACKING_URI, else mlflow.db) and Chromium
without a screen, and ends both (docs/browser.py says what it wants).
"""

import argparse
import json
import os
import sys
import time
import urllib.parse
from pathlib import Path

from browser import Browser, browser, call, mlflow_server

from longtail.tracking import view

WIDTH = 1500
CLOSE = """
document.querySelector('[data-component-id="mlflow.assistant.chat_panel.close"]')?.click();
"""
# The first `Show diff only` is that of the parameters; the settings that all runs share fill pages.
DIFFERENCES = """
[...document.querySelectorAll('[role=switch], input[type=checkbox]')][0]?.click();
"""


def compared(mlflow: str, plan: str, seed: int) -> tuple[str, list[str]]:
    """The experiment and the current runs of the plan's seed, in the order of their names."""
    asked = urllib.parse.quote("longtail")
    found = call("GET", f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name={asked}")
    experiment = found["experiment"]["experiment_id"]
    tags = {"plan": plan, "seed": seed, "current": "yes"}
    runs = call(
        "POST",
        f"{mlflow}/api/2.0/mlflow/runs/search",
        {
            "experiment_ids": [experiment],
            "filter": " AND ".join(f"tags.`longtail.{key}` = '{value}'" for key, value in tags.items()),
            "max_results": 1000,
        },
    ).get("runs", [])
    if not runs:
        sys.exit(f"no current run of plan {plan!r} and seed {seed}: `longtail track` first")
    runs.sort(key=lambda run: run["info"]["run_name"])
    return experiment, [run["info"]["run_id"] for run in runs]


def compare(chromium: Browser, mlflow: str, experiment: str, runs: list[str]) -> None:
    """Open MLflow's page that compares runs, of their parameters only those that differ."""
    ids = json.dumps(runs, separators=(",", ":"))
    show(chromium, f'{mlflow}/#/compare-runs?runs={ids}&experiments=["{experiment}"]', "Show diff only")
    chromium.run(DIFFERENCES)


def show(chromium: Browser, url: str, text: str) -> None:
    """Open a page of MLflow's, its assistant closed."""
    chromium.open(url, text)
    chromium.run(CLOSE)
    time.sleep(2)  # charts are drawn, panels have closed


def main() -> None:
    """Read the flags, start the servers, take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the picture")
    args = parser.parse_args()
    own = Path("mlflow.db").resolve()
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own}"
    if store == f"sqlite:///{own}" and not own.exists():
        sys.exit("no mlflow.db here: `longtail track` first, in the repository's root")
    args.out.mkdir(parents=True, exist_ok=True)
    with mlflow_server(store) as mlflow, browser(WIDTH) as chromium:
        experiment, _ = compared(mlflow, args.plan, args.seed)
        show(chromium, f"{mlflow}{view.address(experiment, args.plan)}", "matching run")
        time.sleep(5)
        chromium.save(args.out / "mlflow-runs.png")
        print(args.out / "mlflow-runs.png")


if __name__ == "__main__":
    main()
