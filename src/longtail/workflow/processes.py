"""Several processes that train one cell together, started by torchrun; with one process, nothing in here does anything.

Each process has a copy of the network and its share of the rows of every batch. A recipe's batch is the joint batch, so
a recipe means the same for any number of processes. Sums over processes are what one process would have summed.
"""

import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn


def launch() -> None:
    """Start this program again under torchrun when LONGTAIL_PROCESSES asks for more than one process.

    LONGTAIL_TORCHRUN holds further flags of torchrun, for several machines. Raises ValueError for no whole number >= 1.
    """
    asked, flags = os.environ.get("LONGTAIL_PROCESSES", "1"), os.environ.get("LONGTAIL_TORCHRUN", "--standalone")
    if not asked.isdecimal() or int(asked) < 1:
        raise ValueError(f"LONGTAIL_PROCESSES={asked}: must be a whole number, at least 1")
    if int(asked) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={asked}", *flags.split()]
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(asked))))
        os.execv(sys.executable, [*torchrun, *sys.argv])


def start(device: torch.device) -> None:
    """Join the other processes, where torchrun started this one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0; the first one writes what there is to write."""
    return dist.get_rank() if dist.is_initialized() else 0


def add_up(tensor: Tensor) -> Tensor:
    """Sum `tensor` over processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(tensor: Tensor) -> Tensor:
    """Replace `tensor` by that of the first process, in place."""
    if world() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def side_by_side(tensor: Tensor) -> Tensor:
    """The tensors of all processes, (world, ...)."""
    if world() == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def rows_of_all(tensor: Tensor) -> Tensor:
    """The rows of all processes, one process's after the other's; they may have different numbers of them."""
    if world() == 1:
        return tensor
    counts = side_by_side(torch.tensor(len(tensor), device=tensor.device)).tolist()
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return torch.cat([part[:count] for part, count in zip(side_by_side(padded), counts, strict=True)])


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over processes, as one message: these networks are small, so there is nothing to overlap."""
    if world() > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        joint = add_up(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, part in zip(gradients, torch.split(joint, [one.numel() for one in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def same_buffers(network: nn.Module) -> None:
    """Give every process the running statistics of the first."""
    if world() > 1:
        for buffer in network.buffers():
            from_first(buffer)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the joint batch; PyTorch's own is for GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape and type."""
        if not self.training or world() == 1:
            return super().forward(x)
        values, count = x.float(), torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        total = add_up(count.clone())
        sums = torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        first, second = differentiable.all_reduce(sums).div(total).unbind()  # type: ignore[no-untyped-call]
        variance = second - first.square()
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(first, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - first * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def synchronise(network: nn.Module) -> None:
    """Make every batch norm of the network one over the joint batch."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
