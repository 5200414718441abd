"""Runs the stages of some cells and prints which of our functions each of them called: for tests/test_manifest.py.

python watched.py FOLDER
"""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import yaml
from conftest import ROOT

import longtail
from longtail.evidence import probe
from longtail.workflow import files, manifest

PACKAGE = str(Path(longtail.__file__).parent)
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
CELLS = [("fast", "gala_balpoe"), ("balpoe", "ldam_drw"), ("short_strong", "crt")]


def recipe(name: str) -> dict:
    """A recipe of the paper plan with a small network."""
    block = PARAMS["recipes"][name]
    return {**block, "network": {**block["network"], "depth": 8}, "batch_size": 16, "gradients_every": 1}


def stages(name: str, method: str) -> list[dict]:
    """The stages of a cell, and before them what a second stage starts from."""
    cell, data, params = "cell", "data.npz", PARAMS["methods"]
    first = {"argv": ["stages/train.py", "--data", data, "--plan", "p", "--dataset", "d", "--recipe", name, "--method",
                      method, "--seed", "1", "--model", f"{cell}/model", "--history", f"{cell}/history.csv"],
             "params": {f"recipes.{name}": recipe(name), f"methods.{method}": params[method]}}  # fmt: skip
    if method == "crt":
        argv = [word.replace("cell/", "base/") for word in first["argv"]]
        argv[argv.index(method)] = "ce"
        base = {"argv": argv, "params": {f"recipes.{name}": recipe(name), "methods.ce": params["ce"]}}
        argv = ["stages/refit.py", "--data", data, "--model", "base/model", "--history", "base/history.csv", "--method",
                method, "--seed", "1", "--out", "cell/model", "--history_out", "cell/history.csv"]  # fmt: skip
        made = [base, {"argv": argv, "params": {f"methods.{method}": params[method]}}]
    else:
        made = [first]
    logits, out = ["--predictions", "p.npz"], "--out"
    rest = [
        {"argv": ["stages/predict.py", "--data", data, "--model", f"{cell}/model", out, "p.npz"], "params": {}},
        {"argv": ["stages/align.py", *logits, out, "a.json"], "params": {"align": PARAMS["align"]}},
        {"argv": ["stages/evaluate.py", *logits, "--alignment", "a.json", "--history", f"{cell}/history.csv", out, "r"],
         "params": {"evaluate": PARAMS["evaluate"]}},
        {"argv": ["stages/compare.py", *logits, out, "r"], "params": {"evaluate": PARAMS["evaluate"]}},
    ]  # fmt: skip
    return [one | {"outs": []} for one in (*made, *rest)]


def main() -> None:
    """Run each cell twice: what modules do when they are loaded is not looked at."""
    folder = Path(sys.argv[1])
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array(["a", "b", "c"])}
    for split, counts in {"train": (30, 12, 6), "held_out": (4, 3, 2), "test": (9, 9, 9)}.items():
        labels = np.repeat(np.arange(3), counts)
        images = rng.integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
        arrays |= {f"{split}_labels": labels, f"{split}_images": images}
    files.save_arrays(folder / "source.npz", **arrays)
    found: dict[str, list[list[str]]] = {}
    seen: set[tuple[str, str]] = set()

    library = manifest.package(ROOT)
    plumbing = {str(library.module(name).file) for name in manifest.PLUMBING}

    def watch(frame, event, _):
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        above = frame
        while above:  # what plumbing calls is plumbing
            if above.f_code.co_filename in plumbing:
                return
            above = above.f_back
        seen.add((frame.f_code.co_filename, frame.f_code.co_qualname.split(".")[0]))

    run_stage = probe.run_stage

    def watched(tree, argv, params):
        seen.clear()
        sys.setprofile(watch)
        threading.setprofile(watch)
        run_stage(tree, argv, params)
        sys.setprofile(None)
        method = argv[argv.index("--method") + 1] if "--method" in argv else ""
        found["-".join(filter(None, [Path(argv[0]).stem, method]))] = sorted(map(list, seen))

    for name, method in CELLS:
        for probe.run_stage in (run_stage, watched):
            job = {"stages": stages(name, method), "data": {"data.npz": str(folder / "source.npz")}, "training": None}
            place = folder / f"{method}-{probe.run_stage.__name__}"
            place.mkdir()
            probe.look(str(place), str(ROOT), steps=1, **job)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
