"""Measure the test logits before and after correction; what is small goes where git keeps it."""

from pathlib import Path

from longtail import distributions, evaluation, files, stage

with stage.run("predictions", "alignment", "history", "out") as (args, params):
    metrics, classes, shifted = evaluation.evaluate(args.predictions, args.alignment, **params["evaluate"])
    files.write_json(f"{args.out}/metrics.json", metrics)
    files.write_csv(f"{args.out}/classes.csv", classes, list(classes[0]))
    files.write_csv(f"{args.out}/distributions.csv", shifted, distributions.COLUMNS)
    files.write_text(f"{args.out}/history.csv", Path(args.history).read_text())
