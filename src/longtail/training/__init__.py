"""From arrays to weights, and from weights to logits: the engine, one cell, second stages, checkpoints."""

from longtail.training.cell import build, train

__all__ = ["build", "train"]
