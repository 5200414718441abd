"""Long-tailed recognition on one footing: data, methods, corrections and measures as a library."""
