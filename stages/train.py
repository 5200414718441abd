"""Train one network: one method, one recipe, one seed."""

from longtail import training
from longtail.workflow import processes, stage

with stage.run("data", "plan", "dataset", "recipe", "method", "seed", "model", "history") as (
    args,
    params,
):
    processes.launch()  # several processes where LONGTAIL_PROCESSES asks for them
    cell = {name: getattr(args, name) for name in ("plan", "dataset", "recipe", "method", "seed")}
    training.train(
        cell,
        args.fingerprint,
        data=args.data,
        recipe=params[f"recipes.{args.recipe}"],
        method=params[f"methods.{args.method}"],
        model=args.model,
        history=args.history,
    )
