"""Run a stage so that any x86-64 processor with AVX2 gives the same bytes: `python stages/portable.py SCRIPT ...`.

A newcomer's first command then ends with the committed files, to the byte. What differs between processors is chosen at
run time, by libraries that look at what there is: vectors of another width sum in another order. Here each is held to
what all have, in one thread, and our kernels, which are compiled for the machine at hand, are left out. Digits lose
nothing by it. Packages of other versions may still give other bytes.
"""

import os
import sys

HELD = {
    "OMP_NUM_THREADS": "1",
    "LONGTAIL_DEVICE": "cpu",
    "LONGTAIL_KERNELS": "off",
    "ATEN_CPU_CAPABILITY": "avx2",  # PyTorch's own loops
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # convolutions
    "MKL_CBWR": "COMPATIBLE",  # PyTorch's matrix products; MKL's AVX2 differs between makers of processors
    "OPENBLAS_CORETYPE": "Haswell",  # those of NumPy and SciPy
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
LEFT_OUT = ("LONGTAIL_WARM", "LONGTAIL_PROCESSES")  # a process that has its libraries already; several processes

if __name__ == "__main__":
    for name in LEFT_OUT:
        os.environ.pop(name, None)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], os.environ | HELD)
