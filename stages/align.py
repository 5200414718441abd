"""Fit corrections of the logits on train and on held-out, never on test."""

from longtail.posthoc import predictions
from longtail.workflow import files, stage

with stage.run("predictions", "out") as (args, params):
    (settings,) = params.values()  # the block `align`, or the plan's own
    files.write_json(args.out, predictions.align(args.predictions, **settings))
