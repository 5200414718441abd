"""Decode all images of an index once, and write down which of them a training may use."""

from pathlib import Path

from longtail.streaming import sets
from longtail.workflow import stage

if __name__ == "__main__":  # workers that decode are spawned, and load this file
    with stage.run("index", "stream", "out") as (args, params):
        settings = dict(params[f"streams.{args.stream}"])
        sets.make(
            args.index,
            args.out,
            layout=params[f"indexes.{settings.pop('index')}"]["layout"],
            made_by=Path("stages/code/stream.txt").read_text(),
            **settings,
        )
