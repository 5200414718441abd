"""What a user sees, in a real browser: the committed report pages, and MLflow's comparison of two cells.

Needs Chromium and its driver (docs/browser.py); .ci/run installs them.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import axe_core_python
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import browser as driver
import mlflow_picture

from longtail.tracking import view

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="no chromedriver: apt-get install chromium-driver"),
]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "results").glob("*/report.html"))
CHAINS = [page for page in PAGES if page.startswith("results/incremental-")]
with (ROOT / "data/published.csv").open(newline="") as table:
    SOURCES = {row["url"] for row in csv.DictReader(table)} - {""}
IMAGES = """
return [...document.images].map(one => {
  const box = one.getBoundingClientRect();
  return {complete: one.complete, natural: one.naturalWidth, width: box.width, height: box.height, alt: one.alt};
});
"""
LINKS = "return [...document.querySelectorAll('[href], [src]')].map(one => one.href || one.src);"
TARGETS = "return [...document.querySelectorAll('[id]')].map(one => one.id);"
OVERFLOW = "return document.documentElement.scrollWidth - window.innerWidth;"
CUT = """
return [...document.querySelectorAll('.scroll')].filter(one => !one.closest('details'))
    .filter(one => one.scrollWidth > one.clientWidth).map(one => one.getAttribute('aria-label'));
"""


@pytest.fixture(scope="module")
def chromium():
    with driver.browser() as found:
        yield found


@pytest.mark.parametrize("page", PAGES)
def test_no_table_loses_its_last_columns_on_a_desktop(chromium, page):
    chromium.size(1300, 900)
    chromium.open((ROOT / page).as_uri(), "Results of plan")
    assert chromium.run(CUT) == []


@pytest.mark.parametrize("width", [1300, 420])
@pytest.mark.parametrize("page", PAGES)
def test_a_report_page_is_whole(chromium, page, width):
    path = ROOT / page
    chromium.requests(), chromium.complaints()
    chromium.size(width, 900)
    chromium.open(path.as_uri(), "Results of plan")
    chromium.run("document.querySelectorAll('details').forEach(one => one.open = true);")
    assert chromium.complaints() == []
    asked = [url for url in chromium.requests() if not url.startswith(("data:", "about:", "chrome:"))]
    assert set(asked) == {path.as_uri()}  # nothing else, from nowhere
    images = chromium.run(IMAGES)
    assert images and all(one["complete"] and one["natural"] > 100 and one["alt"] for one in images)
    assert all(100 < one["width"] <= width and one["height"] > 50 for one in images)
    assert chromium.run(OVERFLOW) <= 0  # tables scroll by themselves, the page does not
    ids = chromium.run(TARGETS)
    for link in chromium.run(LINKS):
        base, _, fragment = link.partition("#")
        if base.startswith("file://") and base != path.as_uri():
            assert Path(base.removeprefix("file://")).is_file(), link
        elif base in SOURCES:
            continue  # where a published value comes from
        elif not base.startswith("data:"):
            assert base == path.as_uri() and fragment in ids, link


def test_a_page_with_a_fault_is_noticed(chromium, tmp_path):
    """The test above can fail: an outside request, a broken picture and a script error are all seen."""
    page = tmp_path / "page.html"
    page.write_text('<p>here</p><img src="none.png" alt="x"><script>undefined_name()</script>'
                    '<link rel="stylesheet" href="http://127.0.0.1:9/x.css">')  # fmt: skip
    chromium.requests(), chromium.complaints()
    chromium.open(page.as_uri(), "here")
    assert any("undefined_name" in message for message in chromium.complaints())
    assert "http://127.0.0.1:9/x.css" in chromium.requests()
    assert chromium.run(IMAGES)[0]["natural"] == 0


FIRST = """
const place = one => one && {top: one.getBoundingClientRect().top, bottom: one.getBoundingClientRect().bottom};
const best = document.querySelector('.first td.best');
return {
  answer: document.querySelector('.answer p').innerText, said: place(document.querySelector('.answer')),
  table: place(document.querySelector('.first table')), best: place(best), right: best.getBoundingClientRect().right,
  picture: place(document.querySelector('.first img')), alt: document.querySelector('.first img').alt,
  open: document.querySelectorAll('details[open]').length, parts: document.querySelectorAll('details').length,
  says: [...document.querySelectorAll('summary span')].map(one => one.innerText),
};
"""


@pytest.mark.parametrize(("width", "height", "screens"), [(1400, 900, 1), (420, 850, 2.5)])
@pytest.mark.parametrize("page", [page for page in PAGES if page not in CHAINS])
def test_the_first_screen_answers(chromium, page, width, height, screens):
    """The sentence, the winner in the table, on a desktop the whole picture; all else is folded, with a sentence."""
    chromium.size(width, height)
    chromium.open((ROOT / page).as_uri(), "Results of plan")
    seen = chromium.run(FIRST)
    begins = r"wins: |is ahead with \d+ of \d+ runs in: |has the highest accuracy, |^Only "
    assert re.search(begins, seen["answer"]), seen["answer"]
    assert re.search(r"settled|^Only ", seen["answer"])
    assert seen["said"]["top"] > 0 and seen["said"]["bottom"] < 0.75 * height
    assert seen["best"]["bottom"] < height and seen["right"] <= width  # beside its method, without scrolling
    assert seen["picture"]["bottom"] < screens * height
    assert seen["alt"].startswith("Test accuracy, the highest method first. ") and " %" in seen["alt"]
    assert seen["open"] == 0 and len(seen["says"]) == seen["parts"] > 5 and all(len(text) > 15 for text in seen["says"])


@pytest.mark.parametrize("page", CHAINS)
def test_the_first_screen_of_chains_answers(chromium, page):
    """What energy aligning is worth after the last step, every read-out beside it, and the bias in a picture."""
    chromium.size(1400, 900)
    chromium.open((ROOT / page).as_uri(), "Results of plan")
    seen = chromium.run(FIRST)
    assert re.search(r"after the last step as trained, .* with energy aligning \(.*settled", seen["answer"])
    assert seen["table"]["bottom"] < 900 and seen["picture"]["bottom"] < 900 and seen["right"] <= 1400
    assert re.search(r"as trained \d+ % for the old ones and \d+ % for the newest", seen["alt"])
    assert seen["open"] == 0 and len(seen["says"]) == seen["parts"] > 4


@pytest.mark.parametrize("page", PAGES)
def test_the_method_stays_in_sight_when_a_table_is_moved(chromium, page):
    chromium.size(420, 850)
    chromium.open((ROOT / page).as_uri(), "Results of plan")
    chromium.run("document.querySelectorAll('details').forEach(one => one.open = true);")
    moved = chromium.run(
        "return [...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).map(one => {"
        " one.scrollLeft = 9999; const head = one.querySelector('tbody th').getBoundingClientRect();"
        " return [head.left - one.getBoundingClientRect().left, head.width]; });"
    )
    assert moved and all(0 <= left < 3 and width < 190 for left, width in moved)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_no_fault(chromium, page, scheme):
    """Contrast, names, structure: the checks of axe-core, with everything unfolded."""
    emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    command = {"cmd": "Emulation.setEmulatedMedia", "params": emulated}
    chromium.size(1400, 900)
    driver.call("POST", f"{chromium.url}/goog/cdp/execute", command)
    chromium.open((ROOT / page).as_uri(), "Results of plan")
    chromium.run("document.querySelectorAll('details').forEach(one => one.open = true);")
    assert axe(chromium) == []


def test_axe_finds_a_fault_where_there_is_one(chromium, tmp_path):
    page = tmp_path / "page.html"
    faint = '<p style="color: #bbb; background: #fff">here</p>'
    page.write_text(f'<html lang="en"><title>x</title><main>{faint}</main></html>')
    chromium.open(page.as_uri(), "here")
    assert any(text.startswith("color-contrast") for text in axe(chromium))


def axe(chromium):
    """The violations that axe-core finds on the page: rule, what it says, and the first element."""
    chromium.run(Path(axe_core_python.__file__).with_name("axe.min.js").read_text())
    found = chromium.run("return axe.run(document, {resultTypes: ['violations']}).then(found => found.violations);")
    return [f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}" for one in found]


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    """A server on a store of its own, into which a bare clone tracked its results of `quick`; and that clone."""
    folder = tmp_path_factory.mktemp("mlflow")
    clone = folder / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    store = f"sqlite:///{folder / 'mlflow.db'}"
    subprocess.run(
        [sys.executable, "-m", "longtail.cli", "track", "quick"],
        cwd=clone, check=True, env=os.environ | {"MLFLOW_TRACKING_URI": store},
    )  # fmt: skip
    with driver.mlflow_server(store) as address:
        yield address, clone


def test_mlflows_comparison_shows_the_metrics_of_two_cells(chromium, mlflow):
    address, clone = mlflow
    experiment, runs = mlflow_picture.compared(address, "quick", 0)
    chromium.size(1500, 2500)
    mlflow_picture.compare(chromium, address, experiment, runs[:2])
    cells = clone / "results/quick/cells/digits_if20/digits"  # here, another machine's may have replaced them
    expected = []
    for run in runs[:2]:
        tags = driver.call("GET", f"{address}/api/2.0/mlflow/runs/get?run_id={run}")["run"]["data"]["tags"]
        method = next(tag["value"] for tag in tags if tag["key"] == "longtail.method")
        accuracy = json.loads((cells / method / "0/metrics.json").read_text())["last"]["raw"]["accuracy"]
        expected.append(f"{accuracy:.4f}".rstrip("0"))
    expected += ["accuracy/few", "aligned train/accuracy", "aurc", "balanced error"]  # the table scrolls
    until, missing = time.monotonic() + driver.PATIENCE_S, expected
    while missing and time.monotonic() < until:  # the plot is there before the table
        time.sleep(1)
        shown = chromium.run("return document.body.innerText")
        missing = [text for text in expected if text not in shown]
    assert not missing


def test_mlflows_view_of_a_plan_has_method_seed_and_what_they_reached(chromium, mlflow):
    address, _ = mlflow
    experiment, _ = mlflow_picture.compared(address, "quick", 0)
    chromium.size(2200, 1000)  # columns beyond the window are not in the page
    mlflow_picture.show(chromium, f"{address}{view.address(experiment, 'quick')}", "matching run")
    wanted = {"accuracy/all", "accuracy/few", "ece", "method", "recipe", "seed", "balpoe", "8 matching runs"}
    driver.wait(str(wanted), lambda: wanted <= lines(chromium))
    assert wanted <= lines(chromium)
    mlflow_picture.show(
        chromium, f"{address}{view.address(experiment, 'quick')}&compareRunsMode=CHART", "Test set, raw logits"
    )
    driver.wait("three bars", lambda: {"accuracy/all", "accuracy/few", "ece"} <= lines(chromium))
    ours = "Test set, raw logits, last epoch (3)"  # before the sections that MLflow makes itself
    driver.wait(ours, lambda: sections(chromium)[:1] == [ours])
    assert sections(chromium)[0] == ours


def sections(chromium) -> list[str]:
    """The headings of charts, each with the number of its charts."""
    found = re.findall(r"^(\S.*)\s+\((\d+)\)$", shown(chromium), re.MULTILINE)
    return [f"{name.strip()} ({count})" for name, count in found]


def lines(chromium) -> set[str]:
    return {line.strip() for line in shown(chromium).splitlines()}


def shown(chromium) -> str:
    return chromium.run("return document.body.innerText")
