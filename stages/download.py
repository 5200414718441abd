"""Read a source, from its own site or a mirror, into canonical arrays."""

from longtail.data import sources
from longtail.workflow import files, stage

with stage.run("source", "out") as (args, params):
    settings = dict(params[f"sources.{args.source}"])
    read = sources.load(settings.pop("reader"))
    files.save_arrays(args.out, **read("data/archives", **settings))
