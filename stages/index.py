"""Find all images of a large data set where they lie, hold lists and labels against its release, and write an index."""

import json

from longtail.data.large import index
from longtail.workflow import files, stage

with stage.run("index", "out") as (args, params):
    arrays = index.make(**params[f"indexes.{args.index}"])
    files.save_arrays(args.out, **arrays)
    print(json.dumps(json.loads(str(arrays["report"])), indent=1))
