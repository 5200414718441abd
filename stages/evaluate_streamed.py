"""Measure the test logits before and after correction, a block at a time; what is small goes where git keeps it."""

from pathlib import Path

from longtail import evaluation
from longtail.evaluation import distributions
from longtail.training import streamed
from longtail.workflow import files, stage

with stage.run("data", "model", "predictions", "alignment", "history", "out") as (args, params):
    found = streamed.evaluate(args.data, args.model, args.predictions, args.alignment, **params["evaluate"])
    files.write_json(f"{args.out}/metrics.json", found.measures)
    files.write_csv(f"{args.out}/classes.csv", found.classes, list(found.classes[0]))
    files.write_csv(f"{args.out}/distributions.csv", found.distributions, distributions.COLUMNS)
    files.write_csv(f"{args.out}/reliability.csv", found.reliability, evaluation.RELIABILITY)
    files.write_csv(f"{args.out}/right.csv", found.right, evaluation.RIGHT)
    files.write_text(f"{args.out}/history.csv", Path(args.history).read_text())
