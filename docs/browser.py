"""Chromium without a screen, driven over WebDriver: JSON over HTTP, nothing from Python beyond this project.

Wants `chromedriver` and `chromium` (Debian: apt-get install chromium chromium-driver).
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
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


@contextmanager
def mlflow_server(store: str) -> Iterator[str]:
    """The address of `mlflow server` on a tracking store; a store that is a server already is left as it is."""
    if store.startswith("http"):
        yield store
        return
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with server([*command, "--port", str(port)], **quiet):
        address = f"http://127.0.0.1:{port}"
        wait("mlflow", lambda: urllib.request.urlopen(f"{address}/health", timeout=5).status == 200)
        yield address


class Browser:
    """Chromium behind a running chromedriver; see `browser`."""

    def __init__(self, driver: str, profile: str, width: int):
        arguments = [*CHROMIUM, f"--user-data-dir={profile}", f"--window-size={width},1000"]
        options: dict[str, Any] = {"args": arguments}
        if chromium := shutil.which("chromium"):
            options["binary"] = chromium
        capabilities = {
            "timeouts": {"script": 1000 * PATIENCE_S},  # Chromium's own, half a minute, is short on a busy machine
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        asked = {"capabilities": {"alwaysMatch": capabilities}}
        session = call("POST", f"{driver}/session", asked)["value"]["sessionId"]
        self.url = f"{driver}/session/{session}"
        self.width = width

    def run(self, script: str) -> Any:
        """Run JavaScript in the page and give what it returns."""
        return call("POST", f"{self.url}/execute/sync", {"script": script, "args": []})["value"]

    def open(self, url: str, text: str) -> None:
        """Open a page and wait until it shows the text."""
        call("POST", f"{self.url}/url", {"url": "about:blank"})  # a changed fragment alone loads nothing
        call("POST", f"{self.url}/url", {"url": url})
        wait(f"{text!r} on {url}", lambda: text in self.run("return document.body.innerText"))

    def size(self, width: int, height: int) -> None:
        """Make the page so wide and high, in CSS pixels; a headless window may be narrower than Chromium's 500."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        call("POST", f"{self.url}/goog/cdp/execute", command)
        time.sleep(1)

    def complaints(self) -> list[str]:
        """What the console said since the last time, warnings and errors."""
        found = call("POST", f"{self.url}/se/log", {"type": "browser"})["value"]
        return [entry["message"] for entry in found if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last time."""
        found = call("POST", f"{self.url}/se/log", {"type": "performance"})["value"]
        events = [json.loads(entry["message"])["message"] for entry in found]
        return [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]

    def save(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(call("GET", f"{self.url}/screenshot")["value"]))

    def close(self) -> None:
        """End Chromium."""
        call("DELETE", self.url)


@contextmanager
def browser(width: int = 1500) -> Iterator[Browser]:
    """Chromium with a profile of its own, ended with the block. SystemExit when there is no chromedriver."""
    driver = shutil.which("chromedriver") or sys.exit("no chromedriver: apt-get install chromium chromium-driver")
    with ExitStack() as stack:
        profile = stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        stack.enter_context(server([driver, f"--port={port}"]))
        wait("chromedriver", lambda: call("GET", f"{address}/status")["value"]["ready"])
        found = Browser(address, profile, width)
        stack.callback(found.close)
        yield found
