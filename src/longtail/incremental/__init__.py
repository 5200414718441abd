"""Class-incremental learning: classes arrive in steps, few images of old ones are kept, new ones are favoured.

A chain of trainings (train), its logits (predict), all ways to remove the bias at inference (readouts), what they are
worth (measures), and a plan's page (report). docs/incremental.md has formulas, protocols and whose they are.
"""
