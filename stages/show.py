"""Show what a plan found, in a few lines, and say where its table and its page are."""

from pathlib import Path

from longtail.workflow import stage

with stage.run("table", "page") as (args, _):
    print(Path(args.table).read_text().partition("\n### ")[0])
    print(f"table: {args.table}\npage:  {args.page} (open it in a browser)\nnext:  `longtail track`, then `mlflow ui`")
