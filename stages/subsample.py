"""Cut a long tail into a source, and hold a part of it out."""

from longtail.data import long_tail
from longtail.workflow import files, stage

with stage.run("source", "dataset", "out", "profile") as (args, params):
    settings = dict(params[f"datasets.{args.dataset}"])
    settings.pop("source")
    arrays = long_tail.cut(files.load_arrays(args.source), **settings)
    files.save_arrays(args.out, **arrays)
    rows = long_tail.profile_rows(
        arrays["train_labels"],
        arrays["held_out_labels"],
        arrays["test_labels"],
        arrays["class_names"],
    )
    files.write_csv(args.profile, rows, list(rows[0]))
