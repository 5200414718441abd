"""Logits and features of every step of a chain whose images are read as they are needed."""

from longtail.streaming import chain
from longtail.workflow import stage

if __name__ == "__main__":  # workers that decode are spawned, and load this file
    with stage.run("data", "order", "protocol", "training", "seed", "model", "out") as (args, params):
        chain.predict(
            args.data,
            args.model,
            args.out,
            order=params[f"incremental.orders.{args.order}"],
            protocol=params[f"incremental.protocols.{args.protocol}"],
            training=params[f"incremental.trainings.{args.training}"],
            seed=int(args.seed),
        )
