"""Fit all read-outs of a chain's logits and measure them; what is small goes where git keeps it."""

from pathlib import Path

from longtail.incremental import measures
from longtail.workflow import files, stage

with stage.run("predictions", "history", "out") as (args, params):
    found = measures.measure(args.predictions, params["incremental.readouts"])
    files.write_json(f"{args.out}/summary.json", found.summary)
    files.write_csv(f"{args.out}/steps.csv", found.steps, measures.STEPS)
    files.write_csv(f"{args.out}/groups.csv", found.groups, measures.GROUPS)
    files.write_csv(f"{args.out}/confusion.csv", found.confusion, measures.CONFUSION)
    files.write_csv(f"{args.out}/energies.csv", found.energies, measures.ENERGIES)
    files.write_text(f"{args.out}/history.csv", Path(args.history).read_text())
