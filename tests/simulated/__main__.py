"""Compile the simulated accelerator into a directory."""

from __future__ import annotations

import sys
from pathlib import Path

from simulated import built

built(Path(sys.argv[1]))
