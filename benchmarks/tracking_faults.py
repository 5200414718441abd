"""What a training pays for a tracking server that fails, and what is lost: `python -m benchmarks.tracking_faults`.

For each kind of store and each fault, a training of fixed work hands every epoch to `longtail.tracking.live` while a
real MLflow server on loopback is absent, killed and started again, slow, or answers 500: all but the first once points
have arrived. Then the server is well, `longtail track` runs twice at the same time, and the points are counted.
PostgreSQL is left out, by name, where its programs or psycopg2 are missing.
"""

import argparse
import hashlib
import http.client
import http.server
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

sys.path.append(str(ROOT / "tests"))
from small_cells import RECIPE, add_cell  # type: ignore[import-not-found]

from longtail.tracking import runs as tracking
from longtail.tracking.live import Live

STORES = ("sqlite", "postgresql")
FAULTS = ("none", "absent", "killed", "slow", "500")
ANSWER_S = 10.0  # of the slow server
START_S = 90.0
CELL = {"plan": "quick", "dataset": "digits_if20", "recipe": "digits", "method": "gala", "seed": 0}


@dataclass
class Line:
    """A line of the table. Seconds; `waited` is what training spent in calls of Live, `points` what was counted."""

    store: str
    fault: str
    training: float
    waited: float
    longest: float
    live: int
    points: int
    missing: int
    twice: int
    runs: int

    def __str__(self) -> str:
        share = 100 * self.waited / self.training
        return (
            f"{self.store:<10}  {self.fault:<6}  {self.training:8.1f}  {share:7.3f}  {1000 * self.longest:10.1f}"
            f"  {self.live:4d}  {self.points:6d}  {self.missing:7d}  {self.twice:5d}  {self.runs:4d}"
        )


HEAD = (
    f"{'store':<10}  {'fault':<6}  training  waited  longest call  live  points  missing  twice  runs\n"
    f"{'':<10}  {'':<6}       (s)     (%)          (ms)"
)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A real MLflow server on loopback that can be killed and started again."""

    folder: Path
    backend: str
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def uri(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, without a wait."""
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--backend-store-uri", self.backend, "--artifacts-destination", str(self.folder / "artifacts"),
            "--workers", "1",
        ]  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError with the end of its log where it does not."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"no MLflow server after {START_S:g} s: {(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Proxy(http.server.ThreadingHTTPServer):
    """Stands before a server; `fault` says how it answers: none, slow, 500."""

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), Relay)
        self.behind, self.fault, self.asked = port, "none", 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what happens here."""


class Relay(http.server.BaseHTTPRequestHandler):
    """One request, on to the server behind the proxy."""

    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def relay(self) -> None:
        """Answer as `fault` says."""
        self.server.asked += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.fault == "500":
            self.send_error(500)
            return
        if self.server.fault == "slow":
            time.sleep(ANSWER_S)
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        behind.request(self.command, self.path, body, headers)
        answer = behind.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = relay


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A PostgreSQL server on loopback with an empty database; its URI."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    data, port = folder / "data", free_port()
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())  # it refuses to run as root
    os.chown(folder, user.pw_uid, user.pw_gid)

    def run(*command: str) -> None:
        options: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid} if os.geteuid() == 0 else {}
        with open(folder.parent / "postgresql.log", "ab") as log:
            subprocess.run(command, check=True, cwd=folder, stdout=log, stderr=log, **options)

    run(str(programs / "initdb"), "-D", str(data), "-U", "longtail", "--auth", "trust", "--no-sync")
    listen = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
    run(str(programs / "pg_ctl"), "-D", str(data), "-w", "-o", listen, "-l", str(folder / "log"), "start")
    try:
        run(str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "longtail", "mlflow")
        yield f"postgresql+psycopg2://longtail@127.0.0.1:{port}/mlflow"
    finally:
        run(str(programs / "pg_ctl"), "-D", str(data), "-w", "-m", "immediate", "stop")


def work(seconds: float) -> None:
    """Keep a core busy; stands for an epoch."""
    until, block = time.monotonic() + seconds, bytes(1 << 16)
    while time.monotonic() < until:
        hashlib.sha256(block).digest()


def train(root: Path, training: str, epochs: int, seconds: float, at: dict[int, Callable[[], None]]) -> list[float]:
    """Epochs of work with live curves; `at` is what happens before an epoch. Returns seconds of each call of Live."""
    calls = []

    def timed(call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        calls.append(time.perf_counter() - began)
        return result

    curves = timed(lambda: Live(CELL, training, {"recipe": RECIPE, "method": {"tau": 1.0}}, root=root).__enter__())
    for epoch in range(1, epochs + 1):
        at.get(epoch, lambda: None)()
        work(seconds)
        timed(curves.log, epoch, {"loss": 2 / epoch, "lr": 0.1 / epoch, "images_per_s": 1000.0})
    timed(curves.__exit__, None, None, None)
    return calls


def track_twice(root: Path) -> None:
    """What `longtail track quick` does, in two processes at once. Raises RuntimeError where one fails."""
    command = [sys.executable, "-c", "from longtail.tracking.runs import track; track('.', ['quick'])"]
    both = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for process in both:
        said = process.communicate(timeout=600)[0]
        if process.returncode:
            raise RuntimeError(f"longtail track: {said}")


def counted(root: Path, epochs: int) -> tuple[int, int, int, int]:
    """Points of the curves, how many are missing, how many are there more than once, and runs of the cell."""
    with tracking.open_store(root) as store:
        mine = [run for run in store.runs() if run.data.tags.get("longtail.kind") == "cell"]
        steps = [
            [row.step for row in store.client.get_metric_history(run.info.run_id, f"curve/{name}")]
            for run in mine
            for name in ("loss", "lr", "train_accuracy")
        ]
    wanted = range(1, epochs + 1)
    missing = sum(len(set(wanted) - set(of)) for of in steps)
    twice = sum(len(of) - len(set(of)) for of in steps)
    return sum(map(len, steps)), missing, twice, len(mine)


def live_points(root: Path) -> int:
    """Losses of the cell that are in the store."""
    with tracking.open_store(root) as store:
        mine = [run.info.run_id for run in store.runs() if run.data.tags.get("longtail.kind") == "cell"]
        return sum(len(store.client.get_metric_history(run, "curve/loss")) for run in mine)


def measure(server: Server, store: str, fault: str, epochs: int, seconds: float) -> Line:
    """A training under a fault, `longtail track` twice at once when all is well again, and the count.

    Raises RuntimeError where no point arrives while the server is well.
    """
    root = server.folder / "checkout"
    training = add_cell(root, "gala", accuracy=0.75, epochs=epochs)
    proxy = Proxy(server.port)
    os.environ["MLFLOW_TRACKING_URI"] = proxy.uri if fault in ("slow", "500") else server.uri
    os.environ["LONGTAIL_LIVE_AFTER"] = "0"
    paused = 0.0

    def begin() -> None:
        nonlocal paused
        since = time.perf_counter()
        while not live_points(root):
            if time.perf_counter() - since > START_S:
                raise RuntimeError(f"no point after {START_S:g} s with a server that is well")
            time.sleep(0.2)
        if fault == "killed":
            server.kill()
        proxy.fault = fault
        paused = time.perf_counter() - since

    at: dict[int, Callable[[], None]] = {}
    if fault != "absent":
        server.start()
        server.wait()
        at[epochs // 3] = begin
    if fault == "killed":
        at[epochs // 2] = server.start
    try:
        began = time.perf_counter()
        calls = train(root, training, epochs, seconds, at)
        took = time.perf_counter() - began - paused
        if fault == "absent":
            server.start()
        server.wait()
        until = time.monotonic() + 180
        while tracking._writes(root, training) and time.monotonic() < until:
            time.sleep(0.2)
        proxy.fault = "none"
        live = live_points(root)
        track_twice(root)
        points, missing, twice, runs = counted(root, epochs)
    finally:
        server.kill()
        proxy.shutdown()
        proxy.server_close()
    return Line(store, fault, took, sum(calls), max(calls), live, points, missing, twice, runs)


def one(store: str, fault: str, epochs: int, seconds: float) -> Line:
    """A line of the table, with a server and a store of its own."""
    with tempfile.TemporaryDirectory(prefix="longtail-tracking-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        if store == "sqlite":
            return measure(Server(folder, f"sqlite:///{folder / 'server.db'}"), store, fault, epochs, seconds)
        (folder / "postgresql").mkdir()
        with postgresql(folder / "postgresql") as uri:
            return measure(Server(folder, uri), store, fault, epochs, seconds)


def missing_for(store: str) -> str | None:
    """What this machine lacks for a store."""
    if store == "postgresql":
        if not any(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
            return "PostgreSQL's programs (Debian: apt install postgresql)"
        if find_spec("psycopg2") is None:
            return "psycopg2 (pip install psycopg2-binary)"
    return None


def main() -> None:
    """Measure, and print the table; `--out` writes it, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=STORES, action="append")
    parser.add_argument("--fault", choices=FAULTS, action="append")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=0.5, help="of work an epoch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [HEAD]
    print(HEAD, flush=True)
    for store in args.store or STORES:
        if what := missing_for(store):
            lines.append(f"{store:<10}  left out: no {what}")
            print(lines[-1], flush=True)
            continue
        for fault in args.fault or FAULTS:
            lines.append(str(one(store, fault, args.epochs, args.seconds)))
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
