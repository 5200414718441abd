"""Which reading of energy aligning wins on held-out images, over all cells of a plan."""

from longtail.evaluation import readings
from longtail.report import more_plots
from longtail.workflow import files, stage

with stage.run("plan", "cells", "out") as (args, params):
    drawn = readings.write(params[f"plans.{args.plan}"], cells_dir=args.cells, out_dir=args.out)
    files.write_bytes(f"{args.out}/energies.png", more_plots.energies(drawn))
