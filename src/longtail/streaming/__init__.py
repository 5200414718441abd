"""Training on large sets of images, which are read as they are needed; the engine knows nothing of files."""
