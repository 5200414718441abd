"""The compiled kernels against PyTorch's own operations, and what happens where they cannot be had."""

import copy
import os
import shutil
import stat

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longtail import networks
from longtail.networks import fused, kernels

pytestmark = pytest.mark.processor
COMPILERS = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
NO_COMPILER = not any(map(shutil.which, COMPILERS))
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler on this machine")
needs_kernels = pytest.mark.skipif(
    NO_COMPILER or os.environ.get("LONGTAIL_KERNELS") == "off", reason="no C++ compiler, or LONGTAIL_KERNELS=off"
)
SHAPES = [(4, 16, 6, 6), (3, 5, 7, 2), (2, 33, 4, 4), (2, 64, 2, 3), (64, 16, 32, 32)]


def activations(shape: tuple[int, ...], dtype: torch.dtype, number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(shape, generator=generator) * 2 + 3 for _ in range(number)]
    return [draw.to(dtype).contiguous(memory_format=torch.channels_last) for draw in draws]


def norm_of(channels: int) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, -1, 1)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


def as_published(x, residual, norm):
    """Ioffe & Szegedy 2015, algorithm 1, in double precision, with the residual and the ReLU behind it."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    normal = (x - mean) / (variance + norm.eps).sqrt()
    y = norm.weight.double().view(1, -1, 1, 1) * normal + norm.bias.double().view(1, -1, 1, 1)
    return F.relu(y if residual is None else y + residual)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_and_relu_are_the_published_ones(shape, dtype, with_residual):
    x, residual, gradient, past = activations(shape, dtype, 4)
    norm = norm_of(shape[1])
    slow = copy.deepcopy(norm)
    out, saved = kernels.forward(x, residual if with_residual else None, norm)
    leaves = [tensor.double().requires_grad_() for tensor in ((x, residual) if with_residual else (x,))]
    expected = as_published(leaves[0], leaves[1] if with_residual else None, slow)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-21
    torch.testing.assert_close(out.double(), expected.detach(), rtol=rounding, atol=rounding)
    wide = x.double()
    torch.testing.assert_close(norm.running_mean, 0.1 * wide.mean((0, 2, 3)).float())
    torch.testing.assert_close(norm.running_var, (0.9 + 0.1 * wide.var((0, 2, 3))).float())
    assert norm.num_batches_tracked == 1

    found = kernels.backward(gradient, past, x, out if with_residual else None, saved)
    expected.backward((gradient.double() + past.double()) * (out > 0))
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
    pairs = [(found[0], leaves[0].grad), (found[2], slow.weight.grad), (found[3], slow.bias.grad)]
    pairs += [(found[1], leaves[1].grad)] if with_residual else []
    for mine, theirs in pairs:
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@needs_kernels
def test_nan_stays_and_one_value_a_channel_is_refused():
    x = torch.full((2, 16, 2, 2), torch.nan).contiguous(memory_format=torch.channels_last)
    assert kernels.forward(x, None, norm_of(16))[0].isnan().all()
    with pytest.raises(ValueError, match="more than one value per channel"):
        kernels.forward(torch.zeros(1, 16, 1, 1), None, norm_of(16))


CONVOLUTIONS = [(5, 16, 32, 12), (40, 32, 16, 8), (2, 64, 64, 32), (3, 16, 16, 4)]
of_convolutions = pytest.mark.parametrize(("images", "size_in", "size_out", "side"), CONVOLUTIONS)


def gradients_of(gradient, x, weight, stride):
    """Gradients of x and weight of a 3x3 convolution in double precision."""
    wide = [tensor.double() for tensor in (gradient, x, weight)]
    return torch.ops.aten.convolution_backward(
        *wide, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )[:2]


@needs_kernels
@pytest.mark.parametrize("stride", [1, 2])
@of_convolutions
def test_gradients_of_a_convolution_are_exact_where_nothing_is_rounded(images, size_in, size_out, side, stride):
    """Whole numbers up to 256 are bfloat16s: no processor, no kernel and no order of a sum may give another one."""
    generator = torch.Generator().manual_seed(0)

    def few_ones(*shape: int) -> torch.Tensor:
        values = torch.randint(-1, 2, shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3)
        return values.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)

    x, weight = few_ones(images, size_in, side, side), few_ones(size_out, size_in, 3, 3)
    gradient = few_ones(images, size_out, side // stride, side // stride)
    assert max(most.max() for most in gradients_of(gradient.abs(), x.abs(), weight.abs(), stride)) <= 256
    found = kernels.convolution_backward(gradient, x, weight, stride)
    for mine, theirs in zip(found, gradients_of(gradient, x, weight, stride), strict=True):
        assert torch.equal(mine.double(), theirs)


@needs_kernels
@pytest.mark.parametrize("stride", [1, 2])
@of_convolutions
def test_gradients_of_a_convolution_are_rounded_as_little_as_can_be(images, size_in, size_out, side, stride):
    """A sum of n additions is off by n units of rounding of its terms' magnitudes at most, by sqrt(n) as a rule.

    Our kernel adds every product in float32. PyTorch's convolutions add so too and round the sum to bfloat16, once;
    where the processor has no AVX-512 they round it after each image, and the gradient of x after each of nine taps.
    """
    (x,) = activations((images, size_in, side, side), torch.bfloat16, 1)
    (gradient,) = activations((images, size_out, side // stride, side // stride), torch.bfloat16, 1)
    (weight,) = activations((size_out, size_in, 3, 3), torch.bfloat16, 1)
    found = kernels.convolution_backward(gradient, x, weight, stride)
    expected = gradients_of(gradient, x, weight, stride)
    magnitudes = gradients_of(gradient.abs(), x.abs(), weight.abs(), stride)
    in_float32, in_bfloat16 = 2**-24, 2**-8  # half of the last digit, of the value
    if kernels.has_weight_gradients():
        additions, unit = images * (side // stride) ** 2, in_float32
    else:
        additions, unit = images, in_bfloat16
    for mine, theirs, most, n, each in zip(
        found, expected, magnitudes, (9, additions), (in_bfloat16, unit), strict=True
    ):
        error = mine - theirs
        assert (error.abs() <= n * each * most).all()
        assert error.norm() <= n**0.5 * each * most.norm()


@needs_kernels
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("images", "side"), [(37, 16), (5, 32)])
def test_weight_gradient_of_many_channels_is_that_of_sixteen_at_a_time(images, side, stride):
    """To the bit: 64 channels are summed in wider tiles, in the same order; committed cells rest on that."""
    if not kernels.has_weight_gradients():
        pytest.skip("PyTorch's weight gradient is used on this processor")
    (x,) = activations((images, 32, side, side), torch.bfloat16, 1)
    (gradient,) = activations((images, 64, side // stride, side // stride), torch.bfloat16, 1)
    weight = torch.zeros(64, 32, 3, 3, dtype=torch.bfloat16)
    _, whole = kernels.convolution_backward(gradient, x, weight, stride)
    for first in range(0, 64, 16):
        part = kernels.channels_last(gradient[:, first : first + 16])
        _, found = kernels.convolution_backward(part, x, weight[first : first + 16], stride)
        assert torch.equal(found, whole[first : first + 16])


@needs_kernels
@pytest.mark.parametrize(("stride", "new"), [(2, 16), (2, 0), (1, 7), (3, 4)])
def test_gradient_of_the_shortcut(stride, new):
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = fused.shortcut(x, stride, new)
    gradient = torch.randn(out.shape).contiguous(memory_format=torch.channels_last)
    out.backward(gradient)
    found = torch.ones(x.shape).contiguous(memory_format=torch.channels_last)
    kernels.add_shortcut(found, gradient, stride)
    torch.testing.assert_close(found, 1 + x.grad)


def resnet(experts: int = 2) -> networks.ResNet:
    torch.manual_seed(0)
    return networks.ResNet(
        channels=3, classes=5, experts=experts, depth=8, width=16, head="linear", scale=1.0,
        mean=[0.5] * 3, std=[0.2] * 3,
    ).to(memory_format=torch.channels_last)  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_with_kernels_is_the_network_without(monkeypatch, precision):
    images, labels = torch.randn(32, 3, 12, 12), torch.randint(5, (32,))
    found = []
    for switch in ("on", "off"):
        monkeypatch.setenv("LONGTAIL_KERNELS", switch)
        kernels.library.cache_clear()
        network = resnet()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images)
        F.cross_entropy(logits.flatten(0, 1), labels.repeat(2)).backward()
        found.append((logits.detach(), torch.cat([p.grad.flatten() for p in network.parameters()]), network))
    kernels.library.cache_clear()
    (logits, grads, network), (plain_logits, plain_grads, plain) = found
    tolerance = 1e-5 if precision == "fp32" else 0.05
    assert (logits - plain_logits).norm() < tolerance * plain_logits.norm()
    # a value at 0 may pass one ReLU and not the other
    assert (grads - plain_grads).norm() < max(5e-3, 4 * tolerance) * plain_grads.norm()
    for (name, mine), theirs in zip(network.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=name)


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads():
    x, residual, gradient = activations((64, 16, 32, 32), torch.bfloat16, 3)
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            out, saved = kernels.forward(x, residual, norm_of(16))
            weight = torch.zeros(16, 16, 3, 3, dtype=torch.bfloat16)
            found.append((out, *kernels.backward(gradient, None, x, out, saved)))
            if kernels.has_weight_gradients():  # of oneDNN's nobody says so
                found[-1] += (kernels.convolution_backward(gradient, x, weight, 1)[1],)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        compared = zip(found[0], other, strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in compared)


def test_without_a_compiler_training_goes_on(tmp_path, monkeypatch, capsys):
    """No compiler, one that fails, and a cache that is written once: PyTorch's operations, one line that says why."""

    def library_with(**env: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in {"XDG_CACHE_HOME": str(tmp_path / "cache"), "LONGTAIL_KERNELS": "on", **env}.items():
                patch.setenv(name, value)
            assert kernels.library.__wrapped__() is None  # not the one of this process
        return capsys.readouterr().err

    nothing = tmp_path / "empty"
    nothing.mkdir()
    assert "no C++ compiler" in library_with(PATH=str(nothing), CXX="")
    assert "nowhere" in library_with(CXX=str(tmp_path / "nowhere"))
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'internal error' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IEXEC)
    assert "internal error" in library_with(CXX=str(broken))
    assert library_with(LONGTAIL_KERNELS="off") == ""
    assert not list(tmp_path.glob("cache/longtail/*"))


@needs_compiler
def test_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = kernels.build()
    made = first.stat().st_mtime_ns
    assert kernels.build() == first and first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [first.name]


@needs_compiler
@pytest.mark.parametrize("cut", [0, 1000, -1])
def test_a_library_that_was_cut_short_is_built_again(tmp_path, monkeypatch, cut):
    """Loading one that is not empty ends Python with a bus error."""
    monkeypatch.setenv("LONGTAIL_KERNELS", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = kernels.build()
    whole = first.read_bytes()
    first.write_bytes(whole[:cut])
    again = kernels.build()
    assert again.read_bytes()[: cut or None] == whole[: cut or None] and len(again.read_bytes()) == len(whole)
    assert kernels.library.__wrapped__() is not None
    assert [path.name for path in again.parent.iterdir()] == [again.name]


@needs_compiler
def test_a_library_that_another_could_have_put_there_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = kernels.build()
    made = first.stat().st_mtime_ns
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700 and stat.S_IMODE(first.stat().st_mode) == 0o700
    first.parent.chmod(
        0o777
    )  # a folder that others can write to is the user's alone again; its libraries are looked at
    assert kernels.build() == first and first.stat().st_mtime_ns == made
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o755
    first.chmod(0o720)
    assert kernels.build() == first and first.stat().st_mtime_ns > made
    first.rename(tmp_path / "elsewhere.so")
    first.symlink_to(tmp_path / "elsewhere.so")
    assert not kernels.build().is_symlink()
    monkeypatch.setattr(kernels.os, "geteuid", lambda: first.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="longtail belongs to another user: remove it, or set XDG_CACHE_HOME"):
        kernels.build()


@needs_compiler
def test_a_compiler_may_have_words_after_it(tmp_path, monkeypatch):
    """As `ccache g++`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (compiler,) = kernels.find_compiler()
    wrapper = tmp_path / "my wrapper"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    for text in (f"'{wrapper}' {compiler}", f"{compiler} -g0", f"env {compiler}"):
        monkeypatch.setenv("CXX", text)
        assert kernels.build().exists()
    spaced = tmp_path / "c++ of mine"
    spaced.symlink_to(compiler)
    monkeypatch.setenv("CXX", str(spaced))
    assert kernels.find_compiler() == [str(spaced)] and kernels.build().exists()
    monkeypatch.setenv("CXX", "'no end")
    assert kernels.library.__wrapped__() is None
