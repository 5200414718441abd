"""Logits of a trained network on train (without augmentation), held-out and test."""

from longtail.training import inference
from longtail.workflow import stage

with stage.run("data", "model", "out") as (args, _):
    inference.predict(args.data, args.model, args.out)
