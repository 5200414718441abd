"""Write requirements-hashed.txt: constraints.txt with the SHA-256 of each file, for `pip install --require-hashes`.

    pip install --dry-run --ignore-installed --quiet --report report.json -c constraints.txt '.[dev]'
    python docs/requirements.py report.json

pip's own report says what it would install and each file's hash. They are those of one platform: whoever runs this.
"""

import json
import sys
from pathlib import Path
from typing import Any

HASHED = Path(__file__).parents[1] / "requirements-hashed.txt"
HEAD = """# constraints.txt with the SHA-256 of each file, for Linux on x86-64 and Python 3.11.
#   pip install --require-hashes -r requirements-hashed.txt && pip install --no-deps --no-build-isolation -e .
# Made by docs/requirements.py.
"""


def hashed(report: dict[str, Any]) -> str:
    """The requirements of a report of pip's, a line each, by name; our own, which is a folder, left out."""
    lines = []
    for one in report["install"]:
        hashes = one["download_info"].get("archive_info", {}).get("hashes", {})
        if "dir_info" not in one["download_info"]:
            lines.append(f"{one['metadata']['name']}=={one['metadata']['version']} --hash=sha256:{hashes['sha256']}\n")
    return HEAD + "".join(sorted(lines, key=str.lower))


if __name__ == "__main__":
    HASHED.write_text(hashed(json.loads(Path(sys.argv[1]).read_text())))
