"""Where a plan's stages are, stages/<plan>/dvc.yaml, and that file's text, from the one template.

DVC reads and writes a whole lock file at the end of every stage: with all plans in one file, a stage of four seconds
waited three for twenty thousand lines that were not its own. The stages that belong to no plan are in stages/dvc.yaml.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from longtail.workflow.manifest import FOLDER

SHARED = "stages/dvc.yaml"
CELL_FILES = (
    "metrics.json",
    "classes.csv",
    "history.csv",
    "distributions.csv",
    "reliability.csv",
    "right.csv",
)
TEMPLATE = "plan.yaml.j2"
SCRIPTS = {"train": "train", "predict": "predict", "refit": "refit"}  # of a cell's stages that need its network
TUNED = {"train": "finetune", "predict": "finetune_predict", "refit": "finetune_refit"}  # where that is a backbone
STREAM = {"train": "stream_train", "predict": "stream_predict", "refit": "stream_refit"}  # where images are files
INCREMENTAL = "incremental.yaml.j2"
INCREMENTAL_FILES = ("summary.json", "steps.csv", "groups.csv", "confusion.csv", "energies.csv", "history.csv")


def file(plan: str) -> str:
    """The pipeline file of a plan, relative to the repository."""
    return f"stages/{plan}/dvc.yaml"


def lock(pipeline: str) -> str:
    """The lock file beside a pipeline file, with what its stages read and wrote."""
    return pipeline.removesuffix(".yaml") + ".lock"


def adopted(plan: str) -> str:
    """The file that says which stages of a plan were recorded as those of later code, relative to the repository."""
    return f"stages/{plan}/adopted.csv"


def locks(root: Path) -> list[Path]:
    """The lock files of all plans that have one."""
    return sorted(root.glob(lock(file("*"))))


def data(dataset: str, params: Mapping[str, Any]) -> str:
    """The stage that makes a data set of a plan: a cut of a source, features of one, features or images of an index."""
    makers = {"features": "features", "indexed": "indexed_features", "streams": "stream"}
    maker = next((stage for section, stage in makers.items() if dataset in params.get(section, ())), "subsample")
    return f"{SHARED}:{maker}@{dataset}"


def making(dataset: str, params: Mapping[str, Any]) -> list[str]:
    """All stages that a data set of a plan needs, in their order."""
    for section in ("indexed", "streams"):
        if dataset in params.get(section, ()):
            return [f"{SHARED}:index@{params[section][dataset]['index']}", data(dataset, params)]
    base = params.get("features", {}).get(dataset, {}).get("dataset", dataset)
    source = f"{SHARED}:download@{params['datasets'][base]['source']}"
    return [source, *dict.fromkeys([data(base, params), data(dataset, params)])]


def left_over(root: Path, plans: Mapping[str, Any]) -> list[str]:
    """The pipeline files of plans that params.yaml has no more: with one of them, every `dvc repro` fails.

    A file counts when it says that `longtail plan` wrote it for the plan of its folder; others are somebody's own.
    """
    found = []
    for path in sorted(root.glob(file("*"))):
        plan = path.parent.name
        if plan not in plans and f"written by `longtail plan {plan}`" in path.read_text().partition("\n")[0]:
            found.append(file(plan))
    return found


def text(plan: str, params: Mapping[str, Any]) -> str:
    """The content of a plan's pipeline file: its cells' stages, with second stages and readings where it has any.

    Args:
        params: the content of params.yaml, which fits its schema.

    Raises ValueError for a plan that params.yaml does not have, and for one that cannot have a file.
    """
    incremental = params.get("incremental", {}).get("plans", {})
    if plan not in params["plans"] and plan not in incremental:
        raise ValueError(
            f"plan {plan!r} is not in params.yaml; there are {', '.join([*params['plans'], *incremental])}"
        )
    if file(plan).startswith(f"{FOLDER}/"):
        raise ValueError(f"plan {plan!r}: {FOLDER} is the folder of the manifests; give the plan another name")
    if plan in incremental:
        files = bool(set(incremental[plan]["datasets"]) & set(params.get("streams", ())))
        return _render(
            INCREMENTAL,
            plan=plan,
            scripts="stream_" if files else "",
            portable=incremental[plan].get("portable", False),
            cell_files=sorted(INCREMENTAL_FILES),
        )
    block = params["plans"][plan]
    fused = block.get("fuse", [])
    if len(fused) > 1:  # a matrix cannot give each its own number of networks
        raise ValueError(f"plans.{plan}.fuse = {fused}: one method at most; another plan takes the next")
    networks = [params["recipes"][recipe]["network"] for recipe in block["recipes"]]
    backbones = sorted({network["backbone"] for network in networks if "backbone" in network})
    streamed = set(block["datasets"]) & {*params.get("indexed", ()), *params.get("streams", ())}
    files = bool(set(block["datasets"]) & set(params.get("streams", ())))
    return _render(
        TEMPLATE,
        plan=plan,
        scripts=STREAM if files else TUNED if backbones else SCRIPTS,
        files=files,
        backbones=backbones,
        refitted=bool(block.get("refit")),
        fused="".join(fused),
        experts=len(params["methods"][fused[0]]["fuse"]) if fused else 0,
        readings=block.get("readings", False),
        portable=block.get("portable", False),
        streamed="_streamed" if streamed else "",
        align=f"plans.{plan}.align" if block.get("align") else "align",
        cell_files=sorted(CELL_FILES),
    )


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(Path(__file__).with_name(template).read_text()).render(**values)
