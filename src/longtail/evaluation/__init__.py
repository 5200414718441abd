"""From logits to measures: of a cell, under other class distributions, of readings; BalPoE's consistency on a toy."""

from longtail.evaluation.cell import RELIABILITY, RIGHT, evaluate

__all__ = ["RELIABILITY", "RIGHT", "evaluate"]
