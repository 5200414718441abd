"""Take pictures of MLflow's pages for a plan: docs/mlflow-runs.png and docs/mlflow-compare.png.

    longtail track
    python docs/mlflow_picture.py --plan quick

Starts `mlflow server` on the store of the current folder (MLFLOW_TRACKING_URI, else mlflow.db) and Chromium
without a screen, and ends both. Wants `chromedriver` and `chromium` (Debian: apt-get install chromium
chromium-driver) and nothing from Python beyond this project: WebDriver is JSON over HTTP. Compares the current
runs of one seed.
"""

import argparse
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

PATIENCE_S = 120
CHROMIUM = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",  # no look-ups of anybody's hosts
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--hide-scrollbars",
)
CLOSE = """
document.querySelector('[data-component-id="mlflow.assistant.chat_panel.close"]')?.click();
"""
EXPAND = """
document.querySelectorAll('.ag-row button[data-component-id*="runnamecellrenderer"]').forEach(one => one.click());
"""
# The first `Show diff only` is that of the parameters; the settings that all runs share fill pages.
DIFFERENCES = """
[...document.querySelectorAll('[role=switch], input[type=checkbox]')][0]?.click();
"""
# Where the metrics end, in pixels from the top of the page.
END_OF_METRICS = """
const heading = [...document.querySelectorAll('main *')].filter(one => one.innerText?.trim() === 'Artifacts').pop();
return heading ? heading.getBoundingClientRect().top : 0;
"""


def call(method: str, url: str, body: object = None) -> Any:
    """Ask an HTTP server that speaks JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, method=method, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def wait(what: str, ready: Callable[[], object]) -> None:
    """Ask until the answer is true; SystemExit names what never came."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            if ready():
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.3)
    sys.exit(f"{what}: nothing in {PATIENCE_S} s")


@contextmanager
def server(command: list[str], **environment: str) -> Iterator[None]:
    """A program that runs until the block ends."""
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def compared(mlflow: str, plan: str, seed: int) -> tuple[str, list[str]]:
    """The experiment and the current runs of the plan's seed, in the order of their names."""
    asked = urllib.parse.quote("longtail")
    found = call("GET", f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name={asked}")
    experiment = found["experiment"]["experiment_id"]
    tags = {"plan": plan, "seed": seed, "current": "yes"}
    runs = call(
        "POST",
        f"{mlflow}/api/2.0/mlflow/runs/search",
        {
            "experiment_ids": [experiment],
            "filter": " AND ".join(f"tags.`longtail.{key}` = '{value}'" for key, value in tags.items()),
            "max_results": 1000,
        },
    ).get("runs", [])
    if not runs:
        sys.exit(f"no current run of plan {plan!r} and seed {seed}: `longtail track` first")
    runs.sort(key=lambda run: run["info"]["run_name"])
    return experiment, [run["info"]["run_id"] for run in runs]


class Browser:
    """Chromium behind a running chromedriver."""

    def __init__(self, driver: str, profile: str):
        arguments = [*CHROMIUM, f"--user-data-dir={profile}", "--window-size=1500,1000"]
        options: dict[str, Any] = {"args": arguments}
        if chromium := shutil.which("chromium"):
            options["binary"] = chromium
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
        session = call("POST", f"{driver}/session", {"capabilities": capabilities})["value"]["sessionId"]
        self.url = f"{driver}/session/{session}"

    def run(self, script: str) -> Any:
        """Run JavaScript in the page and give what it returns."""
        return call("POST", f"{self.url}/execute/sync", {"script": script, "args": []})["value"]

    def open(self, url: str, text: str) -> None:
        """Open a page and wait until it shows the text."""
        call("POST", f"{self.url}/url", {"url": "about:blank"})  # a changed fragment alone loads nothing
        call("POST", f"{self.url}/url", {"url": url})
        wait(f"{text!r} on {url}", lambda: text in self.run("return document.body.innerText"))
        self.run(CLOSE)
        time.sleep(2)  # charts are drawn, panels have closed

    def height(self, pixels: int) -> None:
        """Make the page so high."""
        outer = self.run("return window.outerHeight - window.innerHeight")
        call("POST", f"{self.url}/window/rect", {"width": 1500, "height": pixels + outer})
        time.sleep(1)

    def save(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(call("GET", f"{self.url}/screenshot")["value"]))
        print(path)

    def close(self) -> None:
        """End Chromium."""
        call("DELETE", self.url)


def main() -> None:
    """Read the flags, start the servers, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the pictures")
    args = parser.parse_args()
    driver = shutil.which("chromedriver") or sys.exit("no chromedriver: apt-get install chromium-driver")
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"
    if store == f"sqlite:///{Path('mlflow.db').resolve()}" and not Path("mlflow.db").exists():
        sys.exit("no mlflow.db here: `longtail track` first, in the repository's root")
    args.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        mlflow = store
        if not store.startswith("http"):
            port = free_port()
            command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
            stack.enter_context(
                server(
                    [*command, "--workers", "1", "--port", str(port)],
                    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
                    MLFLOW_DISABLE_TELEMETRY="true",
                )
            )
            mlflow = f"http://127.0.0.1:{port}"
        port = free_port()
        stack.enter_context(server([driver, f"--port={port}"]))
        wait("chromedriver", lambda: call("GET", f"http://127.0.0.1:{port}/status")["value"]["ready"])
        wait("mlflow", lambda: urllib.request.urlopen(f"{mlflow}/health", timeout=5).status == 200)
        experiment, runs = compared(mlflow, args.plan, args.seed)
        profile = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        browser = Browser(f"http://127.0.0.1:{port}", profile)
        stack.callback(browser.close)

        kind = "workflowType=machine_learning"
        view = f"{kind}&compareRunsMode=CHART"
        browser.open(f"{mlflow}/#/experiments/{experiment}/runs?{view}", "matching run")
        browser.run(EXPAND)
        time.sleep(5)
        browser.save(args.out / "mlflow-runs.png")
        ids = json.dumps(runs, separators=(",", ":"))
        browser.open(f'{mlflow}/#/compare-runs?runs={ids}&experiments=["{experiment}"]', "Show diff only")
        browser.run(DIFFERENCES)
        browser.height(3000)  # all of it, to see where the metrics end
        if end := browser.run(END_OF_METRICS):
            browser.height(int(end) - 10)
        browser.save(args.out / "mlflow-compare.png")


if __name__ == "__main__":
    main()
