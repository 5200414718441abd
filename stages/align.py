"""Fit corrections of the logits on train and on held-out, never on test."""

from longtail.posthoc import predictions
from longtail.workflow import files, stage

with stage.run("predictions", "out") as (args, params):
    files.write_json(args.out, predictions.align(args.predictions, **params["align"]))
