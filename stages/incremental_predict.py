"""Logits and features of every step of a chain, on what its read-outs are fitted and measured on."""

from longtail.incremental import predict
from longtail.workflow import stage

with stage.run("data", "order", "protocol", "training", "seed", "model", "out") as (args, params):
    predict.predict(
        args.data,
        args.model,
        args.out,
        order=params[f"incremental.orders.{args.order}"],
        protocol=params[f"incremental.protocols.{args.protocol}"],
        training=params[f"incremental.trainings.{args.training}"],
        seed=int(args.seed),
    )
