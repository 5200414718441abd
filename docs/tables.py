"""Copy tables of committed results into the documents that speak of them; no number there is typed by hand.

python docs/tables.py            # from results/*/table.md
python docs/tables.py --check    # exits with 1 when a document has another table than the committed results
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- results: made by docs/tables.py -->\n", "<!-- end of results -->\n"
COLUMNS = ("Method", "Correction", "Seeds", "All", "Many", "Medium", "Few", "NLL", "ECE")
CORRECTIONS = ("none", "logit adjustment", "aligned on train")  # the others are in the table itself


def shortened(table: str) -> str:
    """The wanted columns and rows of the first Markdown table in `table`."""
    first = table[table.index("\n|") + 1 :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    places = [rows[0].index(column) for column in COLUMNS]
    correction = rows[0].index("Correction")
    rows = rows[:2] + [row for row in rows[2:] if row[correction] in CORRECTIONS]
    return "".join(f"| {' | '.join(row[place] for place in places)} |\n" for row in rows)


def method_and_recipe(table: str) -> str:
    """The section of that name, with what it says before its table."""
    return table.split("### Method and recipe\n\n")[1].split("\n###")[0].rstrip("\n") + "\n"


def by_correction(table: str) -> str:
    """Accuracy of each method (rows) after each correction (columns) out of the first Markdown table in `table`."""
    first = table[table.index("\n|") + 1 :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    method, correction, accuracy = (rows[0].index(column) for column in ("Method", "Correction", "All"))
    found: dict[str, dict[str, str]] = {}
    for row in rows[2:]:
        found.setdefault(row[method], {})[row[correction]] = row[accuracy].strip("*")
    columns = ("none", "logit adjustment", "aligned on train", "aligned on held-out")
    lines = [["Trained with", "as it is", *columns[1:]], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(values[column] for column in columns)] for name, values in found.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


COPIES: dict[str, tuple[str, Callable[[str], str]]] = {
    "README.md": ("results/quick/table.md", shortened),
    "docs/posthoc.md": ("results/posthoc-digits/table.md", by_correction),
    "docs/methods.md": ("results/methods/table.md", method_and_recipe),
}


def with_table(document: str, copied: str) -> str:
    """`document` with `copied` between its two marks."""
    before, rest = document.split(START)
    return before + START + copied + END + rest.split(END)[1]


def committed(path: str) -> str:
    """A run on another machine may change the file here, not what was committed."""
    show = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True)
    return show.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    for document, (results, copy) in COPIES.items():
        text = (ROOT / document).read_text()
        table = committed(results) if check else (ROOT / results).read_text()
        if not check:
            (ROOT / document).write_text(with_table(text, copy(table)))
        elif text != with_table(text, copy(table)):
            sys.exit(f"{document} has another table than the committed {results}: python docs/tables.py")
