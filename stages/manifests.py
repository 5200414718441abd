"""Write down which code each stage runs, so that each depends on its own."""

from pathlib import Path

from longtail.workflow import files, manifest, stage

with stage.run("out") as (args, params):
    named = params | {"incremental": {"trainings": params["incremental.trainings"]}}
    for name, text in manifest.texts(Path.cwd(), named).items():
        files.write_text(f"{args.out}/{name}.txt", text)
