"""Make one network of experts that were trained apart, or of one that looks at mirror images, too."""

from longtail.training import fusion
from longtail.workflow import stage

with stage.run("cells", "method", "seed", "out", "history") as (args, params):
    block = params[f"methods.{args.method}"]
    folders = [f"{args.cells}/{expert}/{args.seed}" for expert in block["fuse"]]
    mirrored = block.get("mirrored", False)
    fusion.run(args.fingerprint, folders, mirrored=mirrored, out=args.out, history=args.history)
