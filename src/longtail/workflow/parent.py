"""How a stage ends before its time: with a word at Ctrl-C and SIGTERM, and with the DVC that runs it.

`kill -9` of dvc leaves no trainer behind that writes on. What is ended here has written whole files or none, and a
training has its checkpoint, so that there is nothing to tidy up.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

LOOK_S = 0.2


def stopped(number: int, _: object) -> NoReturn:
    """End now, and say how to go on: for SIGINT and SIGTERM."""
    if int(os.environ.get("RANK", "0")) == 0:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(128 + number)


def be_ready() -> None:
    """Be ready for signals; only a program's main thread can."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stopped)


def end_with_dvc() -> None:
    """Have this process killed when DVC is gone, soon or already; nothing happens where there is no /proc.

    There the lock of the checkpoint keeps a second training from the same files.
    """
    if sys.platform != "linux":
        return
    below, dvc = chain()
    if dvc and os.getsid(dvc) != os.getsid(below):  # init's child by now: DVC shares its session with what it starts
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=watch, args=[below, dvc], daemon=True).start()


def chain() -> tuple[int, int]:
    """(the process that DVC started, DVC). A shell or torchrun may lie between that process and this one.

    All that belongs to a stage has its name in the environment; DVC itself has not.
    """
    mark = f"DVC_STAGE={os.environ['DVC_STAGE']}".encode()
    below, above = os.getpid(), os.getppid()
    with suppress(OSError):  # somebody else's process, or none: no part of the stage
        while above and mark in Path(f"/proc/{above}/environ").read_bytes().split(b"\0"):
            below, above = above, parent(above)
    return below, above


def parent(process: int) -> int:
    """The parent of a process, as the system has it now. Raises OSError where there is no such process."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def watch(below: int, dvc: int) -> None:
    """Kill this process when `below` has another parent than DVC, or is gone."""
    with suppress(OSError):
        while parent(below) == dvc:
            time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGKILL)
