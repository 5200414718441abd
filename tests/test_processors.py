"""Tests that rest on how a processor computes, as on the other kinds: without AVX-512, AMX or our kernels.

By hand, for the whole suite as on a processor with AVX2 alone:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 CXX=$PWD/tests/avx2-c++ pytest
"""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_kernels import needs_compiler

from longtail.networks import kernels

KINDS = {
    "AVX2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "CXX": str(ROOT / "tests/avx2-c++"),
        "LONGTAIL_KERNELS": "on",
    },
    "no AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "LONGTAIL_KERNELS": "on"},
    "kernels off": {"LONGTAIL_KERNELS": "off"},
    "no compiler": {"CXX": "/nowhere/c++", "LONGTAIL_KERNELS": "on"},
}  # fmt: skip
needs_amx = pytest.mark.skipif(not kernels.amx(), reason="oneDNN has no AMX here, so `no AMX` is this machine itself")
kinds = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("AVX2", marks=needs_compiler), pytest.param("no AMX", marks=[needs_amx, needs_compiler]),
        "kernels off", "no compiler",
    ],
)  # fmt: skip
LOOK = """
import json, torch
from longtail.networks import kernels
from longtail.training import inference
library = kernels.library()
print(json.dumps([library is not None, kernels.has_weight_gradients(), inference.cpu_has_bf16(),
                  torch.backends.cpu.get_cpu_capability()]))
"""


def run(kind: str, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | KINDS[kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@kinds
def test_a_kind_is_what_it_says(kind):
    """The tests below would prove nothing if a switch did not reach oneDNN, PyTorch or our kernels."""
    have_kernels, weight_gradients, bf16, pytorch = json.loads(run(kind, "-c", LOOK))
    assert have_kernels == (kind in ("AVX2", "no AMX"))
    assert weight_gradients == (kind == "no AMX")
    if kind == "AVX2":
        assert not bf16 and pytorch == "AVX2"


@pytest.mark.slow
@kinds
def test_what_rests_on_the_processor_passes(kind):
    files = ["test_kernels", "test_checkpoints"]
    if kind != "no compiler":  # once it is known that there are no kernels, the trainings are those of `kernels off`
        files += ["test_engine", "test_networks", "test_optimizers"]
    said = run(
        kind, "-m", "pytest", "-p", "no:cacheprovider", "-m", "processor and not slow",
        *(f"tests/{file}.py" for file in files),
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= {"AVX2": 100, "no AMX": 100, "kernels off": 70, "no compiler": 7}[kind], said
