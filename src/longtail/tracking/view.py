"""What MLflow's page of a plan shows when it is opened: a shared view, as its button *Share* would save one.

Current runs of the plan, the best first; columns that all methods have; bars of accuracy, of accuracy on the tail and
of calibration. MLflow keeps a view in a tag of the experiment, and opens it by its key in the page's address. A view is
read: what somebody changes on the page is their own and is not kept here.
"""

import json
from typing import Any

TAG = "mlflow.sharedViewState."  # MLflow 3.17, build/static/js: its reader takes plain JSON as well as packed
PARAMS = ("recipe", "method", "seed")
METRICS = ("accuracy/all", "accuracy/many", "accuracy/medium", "accuracy/few", "ece")
BARS = ("accuracy/all", "accuracy/few", "ece")
RUNS = 40  # in a bar chart


def key(plan: str) -> str:
    """The view's name in the address."""
    return f"longtail-{plan}"


def search(plan: str) -> str:
    """The current runs of a plan, in MLflow's language."""
    return (
        f"tags.\"longtail.plan\" = '{plan}' AND tags.\"longtail.kind\" = 'cell' AND tags.\"longtail.current\" = 'yes'"
    )


def state(plan: str) -> str:
    """The view, as MLflow's page keeps it."""
    section = f"{key(plan)}-test"
    bars: list[dict[str, Any]] = [
        {
            "type": "BAR", "uuid": f"{section}-{number}", "metricKey": metric, "metricSectionId": section,
            "runsCountToCompare": RUNS, "deleted": False, "isGenerated": False, "displayName": metric,
        }
        for number, metric in enumerate(BARS)
    ]  # fmt: skip
    return json.dumps(
        {
            "searchFilter": search(plan),
            "orderByKey": "metrics.`accuracy/all`",
            "orderByAsc": False,
            "selectedColumns": [
                *(f"params.`{name}`" for name in PARAMS), *(f"metrics.`{name}`" for name in METRICS),
            ],
            "compareRunCharts": bars,
            "compareRunSections": [
                {
                    "uuid": section, "name": "Test set, raw logits, last epoch", "display": True, "isReordered": False,
                    "deleted": False, "isGenerated": False,
                }
            ],
            "isAccordionReordered": True, "hideEmptyCharts": True,
            "runsHidden": [], "runsHiddenMode": "SHOWALL", "runsPinned": [],
        }
    )  # fmt: skip


def address(experiment: str, plan: str) -> str:
    """The page of the view, below the address of a server: its list; the charts are behind the button beside it."""
    return f"/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={key(plan)}"
