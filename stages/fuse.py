"""Make one network of experts that were trained apart."""

from longtail.training import fusion
from longtail.workflow import stage

with stage.run("cells", "method", "seed", "out", "history") as (args, params):
    experts = params[f"methods.{args.method}"]["fuse"]
    folders = [f"{args.cells}/{expert}/{args.seed}" for expert in experts]
    fusion.run(args.fingerprint, folders, out=args.out, history=args.history)
