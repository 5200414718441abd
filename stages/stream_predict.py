"""Features of a network trained on images of an index, and its heads: what follows needs no image."""

from longtail.streaming import predict
from longtail.workflow import stage

if __name__ == "__main__":  # workers that decode are spawned, and load this file
    with stage.run("data", "model", "features", "heads", "out") as (args, _):
        predict.predict(args.data, args.model, args.features, args.heads, args.out)
