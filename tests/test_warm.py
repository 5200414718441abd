"""Scripts that are handed to a process that has its imports behind it, and what happens where that cannot be."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from longtail.workflow import warm

SCRIPT = """
import os, sys, longtail
print(os.getppid(), sys.argv[1:], os.getcwd(), os.environ.get("NOTE"), os.environ.get("LONGTAIL_WARM"))
print(sorted({"numpy", "sklearn", "longtail.evaluation"} & sys.modules.keys()))
"""


@pytest.fixture(autouse=True)
def _this_library(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))


@pytest.fixture
def server():
    server = warm.Server()
    yield server
    server.close()


@pytest.fixture
def start(tmp_path):
    """A process that runs `text` as a stage's script."""
    (tmp_path / "stages").mkdir()

    def start(text, path, script="stages/evaluate.py"):
        (tmp_path / script).write_text(text)
        env = {**os.environ, "NOTE": "hello", warm.VARIABLE: path}
        command = [sys.executable, script, "--out", "x y"]
        return subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=-1, stderr=-1)

    return start


def test_a_script_runs_in_a_copy_of_the_warm_process_as_it_would_by_itself(server, start, tmp_path):
    output, errors = start(SCRIPT, server.path).communicate()
    first, second = output.splitlines()
    assert first == f"{server.process.pid} ['--out', 'x y'] {tmp_path} hello None", errors
    assert second == "['numpy', 'sklearn']"  # our own code is read anew


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('error: no')", 1, "error: no\n"),
        ("raise ValueError('no')", 1, "ValueError: no\n"),
        ("os.kill(os.getpid(), 15)", -15, ""),  # nobody answers, so it happens again in the script's own process
    ],
)
def test_its_exit_status_and_messages_come_back(server, start, end, status, said):
    process = start(f"import os, sys, longtail\n{end}", server.path)
    _, errors = process.communicate()
    assert process.returncode == status and errors.endswith(said)


@pytest.mark.parametrize("why", ["nobody", "ended", "another script"])
def test_where_it_cannot_be_the_script_runs_by_itself(start, why):
    server = warm.Server()
    if why == "ended":
        server.process.kill()
        server.process.wait()
    path = f"{server.path}.other" if why == "nobody" else server.path
    output, _ = start(
        SCRIPT, path, "stages/train.py" if why == "another script" else "stages/evaluate.py"
    ).communicate()
    server.close()
    assert output.startswith(f"{os.getpid()} ")


def test_a_script_that_is_ended_writes_nothing_more(server, start, tmp_path):
    text = (
        "import time, longtail\nopen('started', 'w').close()\ntime.sleep(1)\nopen('written', 'w').close()\n"
        "time.sleep(60)"
    )
    process = start(text, server.path)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)
    assert not (tmp_path / "written").exists()


def test_a_server_ends_with_the_process_that_started_it():
    text = "from longtail.workflow import warm; server = warm.Server(); print(server.process.pid)"
    pid = int(subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, check=True).stdout)
    until = time.monotonic() + 60
    while (there := is_there(pid)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not there


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
