"""Data sets that do not fit into memory: their releases, where images lie, an index of them, decoding."""
