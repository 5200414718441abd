"""Train a chain of steps: classes arrive one group after the other."""

from longtail.incremental import train
from longtail.workflow import processes, stage

COORDINATES = ("plan", "dataset", "order", "protocol", "recipe", "training", "seed")

with stage.run("data", *COORDINATES, "model", "history") as (args, params):
    processes.launch()  # several processes where LONGTAIL_PROCESSES asks for them
    train.run(
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
