"""Where things are. ``SHARED`` is data outside the repository; tests that need it skip without it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("INPLACE_TTT_SHARED", ROOT.parent / "shared"))
