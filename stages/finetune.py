"""Fine-tune a pretrained backbone: one method, one recipe, one seed."""

from longtail.finetuning import train
from longtail.workflow import processes, stage

COORDINATES = ("plan", "dataset", "recipe", "method", "seed")

with stage.run("data", *COORDINATES, "model", "history") as (args, params):
    processes.launch()  # several processes where LONGTAIL_PROCESSES asks for them
    recipe = params[f"recipes.{args.recipe}"]
    train.train(
        {name: getattr(args, name) for name in COORDINATES},
        args.fingerprint,
        data=args.data,
        recipe=recipe,
        method=params[f"methods.{args.method}"],
        backbone=params[f"backbones.{recipe['network']['backbone']}"],
        model=args.model,
        history=args.history,
    )
