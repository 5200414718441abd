"""Show a plan's table, and say where its page is."""

from pathlib import Path

from longtail.workflow import stage

with stage.run("table", "page") as (args, _):
    print(Path(args.table).read_text())
    print(f"table: {args.table}\npage:  {args.page} (open it in a browser)\nnext:  `longtail track`, then `mlflow ui`")
