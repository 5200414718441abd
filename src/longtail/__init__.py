"""Long-tailed recognition on one footing: data, methods, corrections and measures as a library."""

import os

if os.environ.get("LONGTAIL_WARM"):  # `longtail run` is above: see warm.py
    from longtail.workflow import warm

    warm.hand_over()
