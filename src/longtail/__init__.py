"""Long-tailed recognition on one footing: data, methods, corrections and measures as a library."""

import os
import sys

if os.environ.get("DVC_STAGE") and sys.argv[0].startswith("stages/"):  # before the seconds that imports take
    from longtail.workflow import parent

    parent.be_ready()
    parent.end_with_dvc()

if os.environ.get("LONGTAIL_WARM"):  # `longtail run` is above: see warm.py
    from longtail.workflow import warm

    warm.hand_over()
