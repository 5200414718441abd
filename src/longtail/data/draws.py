"""Random numbers for some images of a chunk, the same whichever images of it are asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Draws for all `count` images of a chunk, of which only those of `rows` are handed out.

    So several processes that augment different rows of the same chunk, each with a generator in the
    same state, use the numbers that one process would use for all rows. Numbers lie on the CPU, so
    that they are the same for every device.
    """

    generator: torch.Generator  # of the CPU
    count: int
    rows: Tensor  # (B,) int64, the wanted places among 0..count-1

    def randint(self, high: int, *lead: int) -> Tensor:
        """Whole numbers (*lead, B) int64, uniform in 0..high-1."""
        return torch.randint(high, (*lead, self.count), generator=self.generator)[..., self.rows]

    def rand(self, *lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers (*lead, B), uniform in [0, 1)."""
        return torch.rand(*lead, self.count, generator=self.generator, dtype=dtype)[..., self.rows]
