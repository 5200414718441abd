"""Batch norm, residual and ReLU as one operation on the CPU: kernels.cpp, compiled on first use (two seconds, once).

PyTorch's own operations read and write an activation once each; these do it twice in all, and a residual network of few
channels is mostly that. Where there is no compiler, PyTorch's operations are used: same formulas, other rounding.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LANES = 16  # of kernels.cpp: channels that are handled together
POINTER, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a line on stderr that says why, where they cannot be had.

    LONGTAIL_KERNELS=off does without.
    """
    if os.environ.get("LONGTAIL_KERNELS") == "off":
        return None
    try:
        compiled = ctypes.CDLL(str(build()))
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a quote in CXX without its end
        stderr = getattr(error, "stderr", None) or str(error)
        reason = stderr.strip().splitlines()[-1] if stderr.strip() else type(error).__name__
        print(f"longtail: training without compiled kernels, which is slower ({reason})", file=sys.stderr)
        return None
    signatures = {
        "forward": [*[POINTER] * 2, *[NUMBER] * 2, *[POINTER] * 2, *[REAL] * 2, *[POINTER] * 4],
        "backward": [*[POINTER] * 4, *[NUMBER] * 2, *[POINTER] * 5],
        "add_shortcut": [POINTER, *[NUMBER] * 6, POINTER],
        "weight_gradient": [*[POINTER] * 2, *[NUMBER] * 6, POINTER],
    }
    for name, arguments in signatures.items():
        for suffix in TYPES.values():
            function = getattr(compiled, f"{name}_{suffix}", None)  # only some processors have the last one
            if function is not None:
                function.argtypes, function.restype = arguments, None
    return compiled


def build() -> Path:
    """Compile kernels.cpp for this processor into the user's cache, unless it is there; returns the library's path.

    The name ends with the SHA-256 of its content, so that one that was cut short is built again. A library runs with
    the user's rights: what others can write to is not taken.

    Raises OSError without a compiler or a place of one's own to write, and CalledProcessError when compiling fails.
    """
    compiler = find_compiler()
    # what -march=native stands for is part of what is built: a cache may be shared by different machines
    machine = _output(*compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull)
    built_from = [_output(*compiler, "--version"), machine, *FLAGS, SOURCE.read_text()]
    name = hashlib.sha256("\0".join(built_from).encode()).hexdigest()[:16]
    folder = _own_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longtail")
    for path in folder.glob(f"kernels-{name}-*.so"):
        if _is_own(path) and path.stem.endswith(_digest(path)):
            return path
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made, linked = Path(work) / "kernels.o", Path(work) / "kernels.so"
        _output(*compiler, *FLAGS, "-c", SOURCE, "-o", made)
        # linked without -fopenmp: the threads are those of PyTorch's own OpenMP library, not of a second one
        _output(*compiler, "-shared", made, "-o", linked)
        linked.chmod(0o700)
        target: Path = linked.replace(folder / f"kernels-{name}-{_digest(linked)}.so")
    return target


def _own_folder(folder: Path) -> Path:
    """The folder, made where there is none, which nobody else can write to. Raises PermissionError for another's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user: remove it, or set XDG_CACHE_HOME")
    if found.st_mode & OTHERS_WRITE:
        folder.chmod(found.st_mode & ~OTHERS_WRITE)
    return folder


def _is_own(path: Path) -> bool:
    """Whether a file is the user's own, and nobody else can write to it."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & OTHERS_WRITE


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def has_weight_gradients() -> bool:
    """Whether weight gradients are our kernel's: it takes AVX512-BF16, and with AMX oneDNN is three times as fast."""
    return hasattr(library(), "weight_gradient_bfloat16") and not amx()


@cache
def amx() -> bool:
    """Whether oneDNN multiplies bfloat16 in AMX tiles here: the processor has them, ONEDNN_MAX_CPU_ISA allows them."""
    allowed = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    return torch.cpu._is_amx_tile_supported() and (allowed in ("ALL", "DEFAULT") or "AMX" in allowed)


def find_compiler() -> list[str]:
    """CXX, which may have words after it (`ccache g++`), or the first compiler on the PATH.

    Raises FileNotFoundError without one.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: none of c++, g++, clang++ is on the PATH")
    return [compiler] if Path(compiler).is_file() else shlex.split(compiler)


def compiler_version() -> str:
    """The first line of what the compiler says of itself. Raises as `build`."""
    return _output(*find_compiler(), "--version").splitlines()[0]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def usable(x: Tensor, norm: nn.BatchNorm2d) -> bool:
    """Whether the kernels take this activation and batch norm; the first call with a CPU tensor compiles them."""
    plain = type(norm) is nn.BatchNorm2d and not torch.compiler.is_compiling()
    return plain and x.device.type == "cpu" and x.dtype in TYPES and library() is not None


def forward(x: Tensor, residual: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """relu(batch_norm(x) + residual) in training mode; updates the running statistics.

    Args:
        x: (B, C, H, W), float32 or bfloat16, channels-last.
        residual: of the same shape and type, or None.

    Returns the result, channels-last as well, and what `backward` needs: mean, 1 / std, scale and shift of each
    channel (4, C).

    Raises ValueError for a single value a channel, which has no variance.
    """
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    if rows < 2:
        raise ValueError(f"batch norm of {tuple(x.shape)}: more than one value per channel is needed")
    out, saved = torch.empty_like(x), torch.empty(4, channels)
    residual = None if residual is None else channels_last(residual)
    _function("forward", x)(
        x.data_ptr(), _pointer(residual), rows, channels, norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps,
        norm.momentum, _pointer(norm.running_mean), _pointer(norm.running_var), saved.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return out, saved


def backward(
    gradient: Tensor, shortcut_gradient: Tensor | None, x: Tensor, out: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, the residual, weight and bias.

    Args:
        gradient, shortcut_gradient: of the result; both are added.
        x, saved: as in and from `forward`.
        out: the result when there was a residual, else None: then x tells where the ReLU was open.
    """
    gradient = channels_last(gradient)
    shortcut_gradient = None if shortcut_gradient is None else channels_last(shortcut_gradient)
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    grad_x, grad_parameters = torch.empty_like(x), torch.empty(2, channels)
    grad_residual = None if out is None else torch.empty_like(x)
    _function("backward", x)(
        gradient.data_ptr(), _pointer(shortcut_gradient), x.data_ptr(), _pointer(out), rows, channels,
        saved.data_ptr(), grad_x.data_ptr(), _pointer(grad_residual),
        grad_parameters[0].data_ptr(), grad_parameters[1].data_ptr(),
    )  # fmt: skip
    return grad_x, grad_residual, grad_parameters[0], grad_parameters[1]


def convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its type, and of the weight, in float32, of a 3x3 convolution with padding 1.

    Of bfloat16, those of the weight are summed in float32 and stay so, but with AMX, where oneDNN rounds the sum.

    Args:
        gradient: of the result (B, out, H', W'), channels-last.
        x: (B, in, H, W), channels-last.
        weight: (out, in, 3, 3), of the type of x.
    """
    images, channels, height, width = gradient.shape
    ours = (
        x.dtype == torch.bfloat16 and stride in (1, 2)
        and width % 2 == 0 and x.shape[2:] == (stride * height, stride * width)
        and channels % LANES == 0 and x.shape[1] % LANES == 0
        and has_weight_gradients()
    )  # fmt: skip
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True, not ours, False]
    )
    grad_x = channels_last(grad_x)  # as it is already where oneDNN made it
    if not ours:
        return grad_x, grad_weight.float()
    grad_weight = torch.empty(weight.shape, memory_format=torch.channels_last)
    _function("weight_gradient", x)(
        x.data_ptr(), gradient.data_ptr(), images, height, width, x.shape[1], channels, stride, grad_weight.data_ptr()
    )
    return grad_x, grad_weight


def add_shortcut(grad_x: Tensor, gradient: Tensor, stride: int) -> None:
    """Add the gradient of option A's shortcut (B, C + new, H', W') to that of x (B, C, H, W), both channels-last."""
    images, channels, height, width = grad_x.shape
    _function("add_shortcut", grad_x)(
        gradient.data_ptr(), images, height, width, channels, stride, gradient.shape[1] - channels, grad_x.data_ptr()
    )


def _function(name: str, x: Tensor) -> Callable[..., None]:
    compiled = library()
    assert compiled is not None, "`usable` comes first"
    function: Callable[..., None] = getattr(compiled, f"{name}_{TYPES[x.dtype]}")
    return function


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def channels_last(x: Tensor) -> Tensor:
    """`x` in the layout that the kernels take; itself where it has it."""
    return x.contiguous(memory_format=torch.channels_last)
