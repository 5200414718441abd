"""Train a chain of steps on images that are read as they are needed."""

from longtail.streaming import chain
from longtail.workflow import processes, stage

COORDINATES = ("plan", "dataset", "order", "protocol", "recipe", "training", "seed")

if __name__ == "__main__":  # workers that decode are spawned, and load this file
    with stage.run("data", *COORDINATES, "model", "history") as (args, params):
        processes.launch()  # several processes where LONGTAIL_PROCESSES asks for them
        chain.run(
            {name: getattr(args, name) for name in COORDINATES},
            args.fingerprint,
            data=args.data,
            order=params[f"incremental.orders.{args.order}"],
            protocol=params[f"incremental.protocols.{args.protocol}"],
            recipe=params[f"incremental.recipes.{args.recipe}"],
            training=params[f"incremental.trainings.{args.training}"],
            model=args.model,
            history=args.history,
        )
