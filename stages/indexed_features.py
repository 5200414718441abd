"""Features of a large data set by a frozen backbone, from its index."""

from pathlib import Path

from longtail.training import indexed
from longtail.workflow import stage

if __name__ == "__main__":  # workers that decode are spawned, and load this file
    with stage.run("index", "features", "out") as (args, params):
        settings = dict(params[f"indexed.{args.features}"])
        indexed.extract(
            args.index,
            args.out,
            layout=params[f"indexes.{settings.pop('index')}"]["layout"],
            backbone=params[f"backbones.{settings.pop('backbone')}"],
            made_by=Path("stages/code/indexed_features.txt").read_text(),
            **settings,
        )
