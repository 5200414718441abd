"""Curves while a training runs, written to MLflow by a child process that the training never waits for.

The result files are the truth and `longtail track` can rebuild every run from them, so this is best effort:
a slow, full, dead or missing tracking server costs rows of a live picture and nothing else. Hence

* this module does not import mlflow (seconds of import, and its client retries for minutes): the child does;
* the pipe to the child never blocks, and whatever goes wrong here is one warning on stderr;
* the child starts only when a training has lasted a while, so that a cell of seconds does not pay for it.

The child (`python -m longtail.tracking.runs live`) reads JSON lines and ends by itself when the pipe closes.
It leaves what it has to say in `runs/.live/<training>.log`. The open log file carries a lock as long as the
child lives, by which `longtail track` knows a run that is still being written.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

try:
    import fcntl
except ImportError:  # Windows has no flock: no live curves there, and one `longtail track` at a time
    fcntl = None  # type: ignore[assignment]

LIVE_AFTER_S = 10.0
EXIT_WAIT_S = 2.0
PENDING_BYTES = 1 << 20  # rows that wait for a slow child; some 5,000 epochs


def log_path(root: str | Path, training: str) -> Path:
    """Where the child of this training writes its errors; locked while it lives."""
    return Path(root) / "runs" / ".live" / f"{training}.log"


def flock(file: IO[Any], *, wait: bool) -> bool:
    """Lock an open file; False when another process has it and we do not wait.

    The lock lives as long as any process has this opening of the file, a child that inherited it included.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Live:
    """Context around a training: `with Live(cell, training, params) as live: live.log(epoch, {...})`.

    cell: plan, dataset, recipe, method, seed. training: `fingerprint(...)`. params: nested values to show,
    {"recipe": {...}, "method": {...}}. root: the repository, where `runs/` and the default store are.

    Never raises and never waits, but for up to EXIT_WAIT_S at the end if the pipe is full. The environment's
    LONGTAIL_LIVE_AFTER sets the seconds before the child starts (0: at once; `off`: never).
    """

    def __init__(
        self,
        cell: Mapping[str, object],
        training: str,
        params: Mapping[str, Any],
        *,
        root: str | Path = ".",
    ) -> None:
        self._training = training
        self._child: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._off = False
        self._warned = False
        self._began = time.monotonic()
        try:
            self._root = Path(root).resolve()
            self._after = self._wait()
            start = {
                "cell": dict(cell),
                "training": training,
                "params": params,
                "root": str(self._root),
                "time": _now_ms(),
            }
            self._send({"start": start})
        except Exception as error:
            self._give_up(f"could not be prepared ({error!r})")

    def __enter__(self) -> Self:
        return self

    def log(self, epoch: int, values: Mapping[str, float | None]) -> None:
        """Hand over the values of one epoch (counted from 1); None and `epoch` itself are left out."""
        if self._off:
            return
        try:
            numbers = {name: float(value) for name, value in values.items() if value is not None and name != "epoch"}
            self._send({"epoch": int(epoch), "time": _now_ms(), "values": numbers})
            if self._child is None and time.monotonic() - self._began >= self._after:
                self._start()
            self._flush()
        except Exception as error:
            self._give_up(f"stopped ({error!r})")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # no Exception: KeyboardInterrupt, SystemExit: stopped from outside
        outcome = "finished" if kind is None else "failed" if issubclass(kind, Exception) else "killed"
        if self._off or self._child is None:
            return
        try:
            self._send({"end": outcome})
            self._flush(until=time.monotonic() + EXIT_WAIT_S)
            assert self._child.stdin is not None
            self._child.stdin.close()  # the child reads to the end and goes; nobody waits for it
        except Exception as failure:
            self._give_up(f"did not get the end ({failure!r})")

    def _wait(self) -> float:
        setting = os.environ.get("LONGTAIL_LIVE_AFTER", "").strip()
        if setting == "off" or fcntl is None:
            self._off = True
            return LIVE_AFTER_S
        try:
            return float(setting or LIVE_AFTER_S)
        except ValueError:
            self._warn(f"LONGTAIL_LIVE_AFTER={setting!r} is neither seconds nor `off`: {LIVE_AFTER_S:g} s")
            return LIVE_AFTER_S

    def _send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(self._pending) + len(line) > PENDING_BYTES:
            self._warn("MLflow is too slow, rows are dropped; `longtail track` adds them")
        else:
            self._pending += line

    def _start(self) -> None:
        path = log_path(self._root, self._training)
        path.parent.mkdir(parents=True, exist_ok=True)
        package = str(Path(__file__).parents[2])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default stalls for minutes on a dead server
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        with open(path, "ab") as log:
            if not flock(log, wait=False):
                return  # a killed run's child is about to end: asked again next epoch
            self._child = subprocess.Popen(
                [sys.executable, "-m", "longtail.tracking.runs", "live"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._root,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the training; the child then hears of it by the pipe
            )
        assert self._child.stdin is not None
        os.set_blocking(self._child.stdin.fileno(), False)

    def _flush(self, *, until: float = 0.0) -> None:
        if self._child is None or self._child.stdin is None:
            return
        pipe = self._child.stdin.fileno()
        while self._pending:
            try:
                self._pending = self._pending[os.write(pipe, self._pending) :]
            except BlockingIOError:
                if not select.select([], [pipe], [], max(0.0, until - time.monotonic()))[1]:
                    return

    def _give_up(self, what: str) -> None:
        self._off = True
        self._pending = b""
        where = log_path(self._root, self._training) if hasattr(self, "_root") else "runs/.live"
        self._warn(f"{what}; training goes on, `longtail track` adds the curves. See {where}")
        try:
            if self._child is not None and self._child.stdin is not None:
                self._child.stdin.close()
        except OSError:
            pass

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            print(f"live curves: {text}", file=sys.stderr)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
