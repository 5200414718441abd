"""One job of `longtail run`: a process that runs the stages of one cell after another, with DVC's own objects.

`dvc repro` once a cell starts DVC, reads the plan's lock file for each stage that is named, and writes all of it at the
end of each. A job does the first two once, and writes the entries of short stages together. What is compared, run and
recorded is DVC's own work (`Stage.reproduce`, `dump_stages`), as in `dvc repro -s`.
"""

import copy
import io
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.workflow import files, pipeline, warm

if TYPE_CHECKING:
    from longtail.workflow.progress import Bar

WRITE_AFTER_S = 60  # what a `kill -9` may cost: the record of the last minute's stages
END = "end"  # what is asked last
WAIT_S = 1.0  # between two looks at whether another DVC has ended


class Job:
    """The process, started when there is work; `environment` is what it has besides this one's.

    With a `bar`, what its stages print goes there.
    """

    def __init__(self, environment: Mapping[str, str], bar: "Bar | None" = None) -> None:
        self.environment = dict(environment)
        self.bar = bar
        self.process: subprocess.Popen | None = None
        self.asking = False  # a question that was broken off has an answer on its way, and nothing else may be asked
        self.connection: Connection

    def run(self, addresses: Sequence[str]) -> bool:
        """Bring the stages up to date, in this order and without what they depend on; False when one of them failed."""
        return self._ask("run", addresses)

    def unchanged(self, addresses: Sequence[str]) -> bool:
        """Whether none of the stages has to run."""
        return self._ask("unchanged", addresses)

    def _ask(self, what: str, addresses: Sequence[str]) -> bool:
        if self.process is None or self.process.poll() is not None:
            self.connection, other = Pipe()
            with other:
                command = [sys.executable, "-m", "longtail.workflow.jobs", str(other.fileno())]
                env = {**os.environ, **self.environment}
                out = {} if self.bar is None else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
                self.process = subprocess.Popen(command, env=env, pass_fds=[other.fileno()], text=True, **out)  # type: ignore[call-overload]
                if self.bar is not None:
                    self.bar.follow(self.process.stdout)  # type: ignore[arg-type]
        self.asking = True
        try:
            self.connection.send((what, list(addresses)))
            answer = bool(self.connection.recv())
        except (EOFError, OSError):  # it died
            answer = False
        self.asking = False
        return answer

    def close(self) -> bool:
        """Have it write what it has not yet, and end; False when it could not, and has said why.

        In the middle of a question, after Ctrl-C, it is hung up on: then its stage ends as well.
        """
        if self.process is None:
            return True
        done = not self.asking and self.process.poll() is None and self._ask(END, [])
        self.connection.close()
        self.process.wait()
        return done


def serve(connection: Connection) -> None:
    """Answer until nobody asks any more, or is there any more: then the stage under way ends, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what has run is recorded
    stages = Stages()
    threading.Thread(target=end_with, args=[connection.fileno()], daemon=True).start()
    asked_to_end = False
    try:
        while True:
            what, addresses = connection.recv()
            if asked_to_end := what == END:
                break
            connection.send(getattr(stages, what)(addresses))
    except (EOFError, OSError, KeyboardInterrupt):
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        stages.close()
        if asked_to_end:  # with an exit status it would race the signal at which it ends when it is hung up on
            with suppress(OSError):
                connection.send(True)


def end_with(connection: int) -> None:
    """End this process when the other end of the connection is closed: `longtail run` has ended, or was killed.

    Its stage ends with it (longtail.workflow.parent).
    """
    hung_up = select.poll()
    hung_up.register(connection, 0)
    hung_up.poll()
    os.kill(os.getpid(), signal.SIGTERM)


class Stages:
    """DVC's stages by their address, and a record of those that have run."""

    def __init__(self) -> None:
        from dvc.dependency import param  # half a second: not for `longtail run` itself
        from dvc.repo import Repo

        param.load_path = parse_once(param.load_path)
        logging.getLogger("dvc").setLevel(logging.CRITICAL)  # as `dvc -q`
        self.repo = Repo(_wait_for_lock=True)  # as `dvc --wait-for-lock`
        self.repo.fs.open = whole(self.repo.fs.open)  # a kill or a full disk must not cost a lock file
        mend(self.repo)
        self.files: dict[str, Any] = {}
        self.ran: dict[str, list[Any]] = {}
        self.written = time.monotonic()
        self.server: warm.Server | None = None

    def run(self, addresses: Sequence[str]) -> bool:
        """As `dvc repro -q -s`; False when a stage failed. Waits for another DVC that is at the files of a stage."""
        from dvc.exceptions import DvcException
        from dvc.stage.exceptions import StageCmdFailedError

        for address in addresses:
            try:
                self._when_free(self._run, address)
            except StageCmdFailedError:  # it has said why
                return False
            except (DvcException, OSError) as error:
                print(f"{address.rpartition(':')[2]}: {error}", file=sys.stderr, flush=True)
                return False
        return True

    def unchanged(self, addresses: Sequence[str]) -> bool:
        """As `dvc status -q`."""
        return not any(self._when_free(self._status, address) for address in addresses)

    def _run(self, address: str) -> None:
        with self.repo.scm_context(quiet=True):
            stage = self._stage(address)
            self._warm_up(stage)
            file = address.rpartition(":")[0]
            if stage.reproduce() is not None:
                self.ran.setdefault(file, []).append(stage)
            # data are recorded at once: another `longtail run` may be waiting for them
            if file == pipeline.SHARED or time.monotonic() - self.written > WRITE_AFTER_S:
                self._write()

    def _status(self, address: str) -> Any:
        return self._stage(address).status()

    def _when_free(self, work: Callable[[str], Any], address: str) -> Any:
        """What the work gives, under DVC's lock; it begins again as long as another DVC is at the stage's files."""
        from dvc.lock import LockError
        from dvc.repo import lock_repo

        said = False
        while True:
            try:
                with lock_repo(self.repo):
                    return work(address)
            except LockError as error:
                if not said:
                    print(f"{address.rpartition(':')[2]} waits: {error}", file=sys.stderr, flush=True)
                said = True
                self.files.pop(address.rpartition(":")[0], None)  # the other one may record this very stage
                time.sleep(WAIT_S)

    def close(self) -> None:
        """Record what has run."""
        from dvc.repo import lock_repo

        with lock_repo(self.repo), self.repo.scm_context(quiet=True):
            self._write()
        if self.server is not None:
            self.server.close()

    def _stage(self, address: str) -> Any:
        file, _, name = address.rpartition(":")
        return self._file(file).stages[name]

    def _file(self, file: str) -> Any:
        from dvc.dvcfile import load_file

        if file not in self.files:  # or no longer: another DVC was at it
            self.files[file] = load_file(self.repo, os.path.abspath(file))
        return self.files[file]

    def _warm_up(self, stage: Any) -> None:
        """A server for the first stage that has to run and gains from it."""
        if self.server is None and stage.name.split("-")[0] in warm.STEPS and stage.changed():
            self.server = warm.Server()
            os.environ[warm.VARIABLE] = self.server.path

    def _write(self) -> None:
        """The lock entries of the stages that have run since the last time, in one go for each file."""
        for file, stages in self.ran.items():
            self._file(file).dump_stages(stages, update_pipeline=False)
        self.ran, self.written = {}, time.monotonic()


def whole(open_file: Callable[..., Any]) -> Callable[..., Any]:
    """DVC's way to open a file, so that one that is written is the old one or the new one at every moment.

    DVC empties its lock files and writes them anew: a `kill -9` or a full disk meanwhile leaves half of one, and no
    command of DVC's works until somebody has put it back.
    """

    @contextmanager
    def written(path: str) -> Iterator[Any]:
        text = io.StringIO()
        yield text
        files.write_text(path, text.getvalue())

    def open_whole(path: Any, mode: str = "r", **options: Any) -> Any:
        return written(path) if mode in ("w", "w+") else open_file(path, mode, **options)

    return open_whole


def mend(repo: Any) -> None:
    """Remove DVC's record of which process is at which file where a `dvc repro` was killed while it wrote it.

    Every command of DVC's refuses a record that cannot be read; it is of running processes, and says nothing then.
    """
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    path, hardlink = Path(repo.tmp_dir, RWLOCK_FILE), repo.config["core"].get("hardlink_lock", False)
    with make_lock(str(path.with_name(RWLOCK_LOCK)), tmp_dir=repo.tmp_dir, hardlink_lock=hardlink):
        try:
            json.loads(path.read_text() if path.exists() else "{}")
        except ValueError:
            path.unlink()


def parse_once(load: Callable[..., Any]) -> Callable[..., Any]:
    """DVC's reader of params.yaml, which parses it for every stage, with a memory of one file's content."""
    known: dict[str, Any] = {}

    def load_path(path: str, fs: Any, **options: Any) -> Any:
        from dvc.utils.serialize import parse_yaml

        if not path.endswith(".yaml"):
            return load(path, fs, **options)
        text = Path(path).read_text()
        if text not in known:
            known.clear()
            known[text] = parse_yaml(text, path)
        return copy.deepcopy(known[text])  # what two stages share would be an alias in the lock

    return load_path


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
