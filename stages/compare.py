"""Compare corrections of the logits: all readings of energy aligning and their relatives, chosen on held-out."""

from longtail.evaluation import readings
from longtail.workflow import files, stage

with stage.run("predictions", "out") as (args, params):
    shots = {key: params["evaluate"][key] for key in ("many_above", "few_below", "ece_bins")}
    files.write_csv(f"{args.out}/corrections.csv", readings.compare(args.predictions, **shots), readings.COLUMNS)
    files.write_csv(f"{args.out}/energies.csv", readings.energies(args.predictions), readings.ENERGIES)
