"""Put the features of a frozen backbone in place of a data set's images."""

from longtail.training import features
from longtail.workflow import stage

with stage.run("data", "features", "out") as (args, params):
    block = params[f"features.{args.features}"]
    features.extract(args.data, args.out, fingerprint=args.fingerprint, **params[f"backbones.{block['backbone']}"])
