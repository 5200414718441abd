"""Train a network on images of an index: one method, one recipe, one seed."""

from longtail.streaming import train
from longtail.workflow import processes, stage

COORDINATES = ("plan", "dataset", "recipe", "method", "seed")

if __name__ == "__main__":  # workers that decode are spawned, and load this file
    with stage.run("data", *COORDINATES, "model", "history") as (args, params):
        processes.launch()  # several processes where LONGTAIL_PROCESSES asks for them
        recipe = params[f"recipes.{args.recipe}"]
        backbone = recipe["network"].get("backbone")
        train.train(
            {name: getattr(args, name) for name in COORDINATES},
            args.fingerprint,
            data=args.data,
            recipe=recipe,
            method=params[f"methods.{args.method}"],
            backbone=params[f"backbones.{backbone}"] if backbone else None,
            model=args.model,
            history=args.history,
        )
