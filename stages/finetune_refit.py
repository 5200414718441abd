"""Give a fine-tuned network other heads, on its features."""

from longtail.finetuning import predict
from longtail.workflow import stage

with stage.run("data", "model", "history", "method", "seed", "out", "history_out") as (args, params):
    settings = dict(params[f"methods.{args.method}"])
    predict.refit(
        args.fingerprint,
        data=args.data,
        model=args.model,
        history=args.history,
        way=settings.pop("refit", args.method),
        seed=int(args.seed),
        out=args.out,
        history_out=args.history_out,
        **settings,
    )
