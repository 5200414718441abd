"""Copy the table of the plan `quick` into README.md, shortened; no number there is typed by hand.

python docs/readme_table.py            # from results/quick/table.md
python docs/readme_table.py --check    # exits with 1 when README.md is not that of the committed results
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = "results/quick/table.md"
COLUMNS = ("Method", "Correction", "Seeds", "All", "Many", "Medium", "Few", "NLL", "ECE")
CORRECTIONS = ("none", "logit adjustment", "aligned on held-out")  # the others are in the table itself
START, END = "<!-- results: made by docs/readme_table.py -->\n", "<!-- end of results -->\n"


def shortened(table: str) -> str:
    """The wanted columns and rows of the first Markdown table in `table`."""
    first = table[table.index("\n|") + 1 :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    places = [rows[0].index(column) for column in COLUMNS]
    correction = rows[0].index("Correction")
    rows = rows[:2] + [row for row in rows[2:] if row[correction] in CORRECTIONS]
    return "".join(f"| {' | '.join(row[place] for place in places)} |\n" for row in rows)


def with_table(readme: str, table: str) -> str:
    """`readme` with the table between its two marks."""
    before, rest = readme.split(START)
    return before + START + shortened(table) + END + rest.split(END)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    readme = (ROOT / "README.md").read_text()
    if parser.parse_args().check:  # a run on another machine may change the file here, not what was committed
        show = subprocess.run(["git", "show", f"HEAD:{TABLE}"], cwd=ROOT, capture_output=True, text=True, check=True)
        same = readme == with_table(readme, show.stdout)
        sys.exit(0 if same else "README.md has another table than the committed results: python docs/readme_table.py")
    (ROOT / "README.md").write_text(with_table(readme, (ROOT / TABLE).read_text()))
