"""Whether the balanced product of experts is Fisher-consistent, on a toy whose best rule is known."""

import torch

from longtail.evaluation import fisher
from longtail.report import more_plots
from longtail.workflow import files, stage

with stage.run("out") as (args, params):
    torch.set_num_threads(1)  # sums in one order on any machine, and products this small gain nothing from more
    rows = fisher.write(params["fisher"], out_dir=args.out)
    files.write_bytes(f"{args.out}/fisher.png", more_plots.fisher(rows))
