"""What is measured of a network on a large data set, but for its logits."""

from longtail.training import streamed
from longtail.workflow import stage

with stage.run("data", "model", "out") as (args, _):
    streamed.predict(args.data, args.model, args.out)
