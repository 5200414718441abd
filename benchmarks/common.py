"""The engine, as the programs use it: `python -m benchmarks.common SETTING` answers questions about one training.

The only file here that knows longtail's training: when that changes, this does. A turn is [images, seconds].
"""

from collections.abc import Callable
from itertools import cycle, islice
from time import perf_counter
from typing import Any

import torch
import yaml

from benchmarks.harness import ROOT, Setting, peak_memory, serve
from longtail import losses, networks
from longtail.data import batches
from longtail.training import inference
from longtail.training.engine import Training

READY = 4  # batches that lie ready for bare steps: few, so that they are no part of the peak memory
DEVICE = torch.device("cpu")
PRECISION = inference.precision_on(DEVICE, "bf16")


class Bench:
    """A training of random images, cut so that its parts can be timed one by one.

    The loss is the mean of the experts' cross-entropies.
    """

    def __init__(self, setting: Setting):
        inference.set_up(0)
        self.setting = setting
        recipe = yaml.safe_load((ROOT / "params.yaml").read_text())["recipes"]["gala"]
        augmentation = {**recipe["augmentation"], "policy": setting.policy, "cutout": setting.cutout}
        recipe |= {
            "batch_size": setting.batch_size, "drop_last": False, "augmentation": augmentation,
            "mixup_alpha": setting.mixup_alpha, "precision": PRECISION,
        }  # fmt: skip
        del recipe["test_every"]  # the rest is Training's
        shape = {**recipe.pop("network"), **recipe.pop("normalization"), "depth": setting.depth}
        network = networks.ResNet(channels=3, classes=setting.classes, experts=setting.experts, **shape)
        network.to(memory_format=torch.channels_last)
        images = torch.randint(256, (setting.images, 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(setting.classes, (setting.images,))
        loss = losses.load("balpoe")(torch.ones(setting.classes), taus=[0.0] * setting.experts)
        split = batches.Split(images, labels, setting.classes)
        self.training = Training(network, loss, split, seed=0, **recipe)

    def warm_up(self) -> None:
        """Go through everything once, and have some batches ready."""
        self.ready = cycle([*islice(self._stream(), READY)])
        network, loss = self.training.network.train(), self.training.loss.train()
        assert network.training and loss.training
        for batch in islice(self.ready, READY):
            self.training.step(batch)

    def step(self) -> tuple[int, float]:
        """A turn of steps on ready batches, augmented and mixed beforehand."""
        return timed(lambda: sum(self._step(batch) for batch in islice(self.ready, self.setting.steps)))

    def _step(self, batch: batches.Batch) -> int:
        self.training.step(batch)
        return batch.size

    def epoch(self) -> tuple[int, float]:
        """A whole epoch, as a cell trains it."""
        self.training.next_epoch()
        return timed(lambda: self.training.finish_epoch(lambda: None))

    def data(self) -> tuple[int, float]:
        """An epoch's batches, without a network."""
        return timed(lambda: sum(batch.size for batch in self._stream()))

    def _stream(self) -> Any:
        return batches.epoch(self.training.train_split, **self.training.batches, epoch=self.training.epoch)

    def flops(self) -> int:
        """Floating-point operations of a training step an image: three times those of the forward pass.

        PyTorch's counter sees the convolutions and the head of a forward pass in evaluation mode, which has no
        operations of our own; a multiply-add is two. Backward is taken for twice forward, as usual.
        """
        from torch.utils.flop_counter import FlopCounterMode  # 100 MB that no training needs

        network = self.training.network.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, 32, 32))
        network.train()
        return 3 * int(counter.get_total_flops())


def timed(work: Callable[[], int]) -> tuple[int, float]:
    """What `work` returns, and its seconds."""
    start = perf_counter()
    return work(), perf_counter() - start


if __name__ == "__main__":
    loaded = peak_memory()
    bench = Bench(Setting.from_command_line())
    bench.warm_up()
    answers = {"step": bench.step, "epoch": bench.epoch, "data": bench.data, "flops": bench.flops}
    serve({"loaded": loaded}, {**answers, "peak memory": peak_memory})
