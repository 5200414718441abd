"""Logits of a fine-tuned network on train (without augmentation), held-out and test."""

from longtail.finetuning import predict
from longtail.workflow import stage

with stage.run("data", "model", "out") as (args, _):
    predict.predict(args.data, args.model, args.out)
