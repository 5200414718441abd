"""Augmentation of whole batches: its steps, its policies, and what they do to images."""
