"""Fit corrections of the logits on train and on held-out, never on test; logits come a block at a time."""

from longtail.training import streamed
from longtail.workflow import files, stage

with stage.run("data", "model", "out") as (args, params):
    (settings,) = params.values()  # the block `align`, or the plan's own
    files.write_json(args.out, streamed.align(args.data, args.model, **settings))
