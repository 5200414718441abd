"""Copy tables and a picture of committed results into the documents that show them; no number is typed by hand.

python docs/tables.py            # from results/*/table.md
python docs/tables.py --check    # exits with 1 when a document has another table than the committed results
"""

import argparse
import base64
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- results: made by docs/tables.py -->\n", "<!-- end of results -->\n"
CORRECTIONS = ("as it is", "logit adjustment", "aligned on train", "aligned on held-out")  # those a reader can use


def answer(table: str) -> str:
    """The sentence, the first table and how to read it, of the only data set."""
    said = table.split("\n## ")[1].split("\n### ")[0]
    blocks = said.strip().split("\n\n")[1:]
    return "\n\n".join([blocks[0].strip("*"), *blocks[-2:]]) + "\n"


def method_and_recipe(table: str) -> str:
    """The section of that name, with what it says before its table."""
    return table.split("### Method and recipe\n\n")[1].split("\n###")[0].rstrip("\n") + "\n"


def by_correction(table: str) -> str:
    """Accuracy of each method after each correction, of a plan with one recipe."""
    first = table.split("### Corrections\n\n")[1].split("\n\n")[1]
    rows = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in first.splitlines()]
    places = [0, *(rows[0].index(correction) for correction in CORRECTIONS)]
    rows[0][0] = "Trained with"
    return "".join(f"| {' | '.join(row[place] for place in places)} |\n" for row in rows)


def trainings(table: str) -> str:
    """The table of trainings and read-outs of the only setting, and how to read it."""
    blocks = table.split("\n## ")[1].split("\n### ")[0].strip().split("\n\n")
    return "\n\n".join([*(block for block in blocks if block.startswith("|")), blocks[-1]]) + "\n"


COPIES: dict[str, list[tuple[str, Callable[[str], str]]]] = {  # of each document its tables, from the top
    "README.md": [("results/paper-cifar100/table.md", answer)],
    "docs/posthoc.md": [
        ("results/posthoc-digits/table.md", by_correction),
        ("results/posthoc/table.md", by_correction),
    ],
    "docs/incremental.md": [("results/incremental-cifar100/table.md", trainings)],
    "docs/methods.md": [("results/methods/table.md", method_and_recipe)],
}


PAGE, PICTURE = "results/paper-cifar100/report.html", "docs/paper-cifar100.png"  # the page's first picture


def picture(page: str) -> bytes:
    """The first picture of a page, which has all of them in itself."""
    return base64.b64decode(page.split("data:image/png;base64,")[1].partition('"')[0])


def with_tables(document: str, copied: list[str], start: str = START) -> str:
    """`document` with each of `copied` between its two marks; ValueError where there are not as many."""
    before, *rest = document.split(start)
    tables = zip(copied, (part.split(END)[1] for part in rest), strict=True)
    return before + "".join(start + table + END + after for table, after in tables)


def committed(path: str) -> str:
    """A run on another machine may change the file here, not what was committed."""
    show = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True)
    return show.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    for document, sources in COPIES.items():
        text = (ROOT / document).read_text()
        tables = [copy(committed(path) if check else (ROOT / path).read_text()) for path, copy in sources]
        if not check:
            (ROOT / document).write_text(with_tables(text, tables))
        elif text != with_tables(text, tables):
            of = ", ".join(path for path, _ in sources)
            sys.exit(f"{document} has another table than the committed {of}: python docs/tables.py")
    if not check:
        (ROOT / PICTURE).write_bytes(picture((ROOT / PAGE).read_text()))
