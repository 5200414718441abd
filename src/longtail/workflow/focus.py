"""What DVC sees: with `longtail focus PLAN` the pipelines of other plans are hidden from it, by stages/.dvcignore.

DVC reads every pipeline of a repository before it does anything, and in an experiment again after every stage: most of
its time goes to plans that nobody asked for (docs/experiments.md has figures). The file is this checkout's own; git
ignores it. Nothing else changes: results, locks and the cache stay as they are.
"""

from collections.abc import Iterable
from pathlib import Path

from longtail.workflow import files, pipeline
from longtail.workflow.manifest import FOLDER

FILE = "stages/.dvcignore"
HEAD = "# Written by `longtail focus`: what DVC does not see. `longtail focus --all` removes this file.\n"


def seen(root: Path) -> set[str] | None:
    """The plans that DVC sees; None where it sees all."""
    path = root / FILE
    if not path.exists():
        return None
    kept = [line for line in path.read_text().splitlines() if line.startswith("!/")]
    return {line.strip("!/") for line in kept} - {Path(FOLDER).name}


def write(root: Path, plans: Iterable[str]) -> None:
    """Show these plans to DVC, and no other."""
    kept = [Path(FOLDER).name, *sorted(plans)]
    files.write_text(root / FILE, HEAD + "/*/\n" + "".join(f"!/{name}/\n" for name in kept))


def add(root: Path, plan: str) -> None:
    """Show one more plan, where some are hidden."""
    plans = seen(root)
    if plans is not None and plan not in plans:
        write(root, {*plans, plan})


def clear(root: Path) -> None:
    """Show all plans."""
    (root / FILE).unlink(missing_ok=True)


def check(root: Path, plan: str) -> None:
    """Raise ValueError for a plan that DVC does not see."""
    plans = seen(root)
    if plans is not None and plan not in plans:
        raise ValueError(
            f"plan {plan!r} is hidden from DVC by {FILE}, which shows {', '.join(sorted(plans))}; "
            f"`longtail focus {' '.join(sorted({*plans, plan}))}` shows it, too"
        )


def hidden(root: Path, plans: Iterable[str]) -> list[str]:
    """Those of the plans that DVC does not see."""
    shown = seen(root)
    return (
        [] if shown is None else [plan for plan in plans if plan not in shown and (root / pipeline.file(plan)).exists()]
    )
