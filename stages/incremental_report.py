"""The plan's table, page and pictures, with the published values beside ours."""

from longtail.incremental import report
from longtail.workflow import stage

with stage.run("plan", "cells", "published", "out") as (args, params):
    report.write(
        args.plan,
        params[f"incremental.plans.{args.plan}"],
        cells_dir=args.cells,
        published=args.published,
        out_dir=args.out,
    )
