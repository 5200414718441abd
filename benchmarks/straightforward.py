"""The straightforward loop that the engine is compared with: PyTorch's own modules, nothing of longtail.

A ResNet for CIFAR whose experts share the stem and the first group, in eager PyTorch, autocast to bfloat16,
channels-last. Same layers, loss and optimiser as the engine's; answers the question "step" with [images, seconds].
"""

from itertools import cycle, islice
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Setting, serve

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


class BasicBlock(nn.Module):
    """Two convolutions; the shortcut takes every second pixel and pads with zero channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


def make_layer(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A group of blocks."""
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


class ResNet(nn.Module):
    """Logits of each expert, a list of (B, classes)."""

    def __init__(self, depth: int, experts: int, classes: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = make_layer(blocks, 16, 16, 1)
        self.layer2 = nn.ModuleList(make_layer(blocks, 16, 32, 2) for _ in range(experts))
        self.layer3 = nn.ModuleList(make_layer(blocks, 32, 64, 2) for _ in range(experts))
        self.linear = nn.ModuleList(nn.Linear(64, classes) for _ in range(experts))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        logits = []
        for layer2, layer3, linear in zip(self.layer2, self.layer3, self.linear, strict=True):
            logits.append(linear(layer3(layer2(x)).mean((2, 3))))
        return logits


class Loop:
    """The training loop on data that are there already."""

    def __init__(self, setting: Setting):
        torch.manual_seed(0)
        self.setting = setting
        self.net = ResNet(setting.depth, setting.experts, setting.classes)
        self.net.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        shape = (setting.batch_size, 3, 32, 32)
        batches = [
            (
                torch.randn(shape).contiguous(memory_format=torch.channels_last),
                torch.randint(setting.classes, (setting.batch_size,)),
            )
            for _ in range(4)
        ]
        self.data = cycle(batches)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            logits = self.net(images)
            loss = torch.stack([F.cross_entropy(expert, labels) for expert in logits]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def steps(self, count: int) -> float:
        """Seconds of `count` steps."""
        start = perf_counter()
        for images, labels in islice(self.data, count):
            self.step(images, labels)
        return perf_counter() - start


if __name__ == "__main__":
    setting = Setting.from_command_line()
    loop = Loop(setting)
    loop.steps(4)  # warm
    serve({}, {"step": lambda: (setting.steps * setting.batch_size, loop.steps(setting.steps))})
