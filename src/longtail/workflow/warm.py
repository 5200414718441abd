"""A process that has imported what short stages need, and forks for each: seconds of imports become milliseconds.

A job of `longtail run` starts one, and says in LONGTAIL_WARM where it listens. DVC runs the commands of its record as
ever; `import longtail`, the first thing that they do, hands them over: a copy of the warm process runs the same script
with the same arguments, folder, environment and open files, and its exit status comes back. Where nobody listens or
nobody answers, the script goes on by itself.

Our own modules are imported anew by each copy, so that none runs code that has been edited since.
"""

import contextlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from importlib import import_module
from typing import Any, NoReturn

VARIABLE = "LONGTAIL_WARM"
SCRIPTS = ("stages/align.py", "stages/evaluate.py")  # tenths of a second of work each
WANTED = ("longtail.evaluation.cell", "longtail.posthoc.predictions", "longtail.workflow.stage")  # for what they import
STEPS = ("align", "evaluate")  # of a cell, the stages with these scripts


class Server:
    """The process; it ends when it is closed, and with the one that started it."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="longtail-")  # short, and nobody else's: a socket's path has 100 letters
        self.path = f"{self.folder}/socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen()  # who comes before it is ready waits in line
            command = [sys.executable, "-m", "longtail.workflow.warm", str(listener.fileno())]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def hand_over() -> None:
    """Have this script run by the server and exit as it does there; returns where that cannot be."""
    if sys.argv[0] not in SCRIPTS:
        return
    request = {
        "argv": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ), "group": os.getpgrp(), "python": _python(),
    }  # fmt: skip
    data = json.dumps(request).encode()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.environ[VARIABLE])
            socket.send_fds(connection, [len(data).to_bytes(4, "big")], [0, 1, 2])
            connection.sendall(data)
            status = connection.recv(1)
    except OSError:
        return
    if status:
        sys.exit(status[0])


def _python() -> list[Any]:
    """What makes an import find the same file."""
    return [sys.version, sys.prefix, *sys.path[1:]]


def serve(listener: socket.socket) -> None:
    """Answer until standard input is closed."""
    with contextlib.suppress(Exception):  # what is wrong with our own code is said by the script that needs it
        for name in WANTED:
            import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "longtail"]:
        del sys.modules[name]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no copy is waited for
    while True:
        ready, _, _ = select.select([listener.fileno(), 0], [], [])
        if 0 in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    """Run what is asked for and say how it ended; in the copy, which ends here."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        length, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
        data = b""
        while len(data) < int.from_bytes(length, "big"):
            part = connection.recv(1 << 16)
            if not part:
                os._exit(1)
            data += part
        request = json.loads(data)
        if request["python"] != _python():
            os._exit(1)  # and no answer: it runs there
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        with contextlib.suppress(OSError):
            os.setpgid(0, request["group"])  # what ends the one that asks, Ctrl-C say, ends this one
        threading.Thread(target=_end_with, args=[connection], daemon=True).start()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update({name: value for name, value in request["env"].items() if name != VARIABLE})
        sys.argv = request["argv"]
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        status = _run(sys.argv[0])
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([status]))
    finally:
        os._exit(1)


def _end_with(connection: socket.socket) -> None:
    """End when the one that asks is gone: nothing more is written then."""
    if not connection.recv(1):
        os._exit(1)


def _run(script: str) -> int:
    """The exit status of a script, as Python has it."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 255
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt), socket.socket(fileno=int(sys.argv[1])) as inherited:
        serve(inherited)
