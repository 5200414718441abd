"""Give a network that was trained on images of an index other heads, on frozen features."""

from longtail.streaming import predict
from longtail.workflow import stage

if __name__ == "__main__":  # workers that decode are spawned, and load this file
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
