"""Fine-tuning of a pretrained backbone: the engine trains its last groups and heads, and knows nothing of it."""
