"""The plan's table, page and plots, with the published values beside ours."""

from longtail import report
from longtail.workflow import stage

with stage.run("plan", "cells", "published", "times", "out") as (args, params):
    report.write(
        args.plan,
        params[f"plans.{args.plan}"],
        cells_dir=args.cells,
        published=args.published,
        out_dir=args.out,
        times=args.times,
    )
