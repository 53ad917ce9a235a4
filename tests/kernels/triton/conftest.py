"""Puts this folder on the path, so that its tests can import `paged` and others (pytest's importlib mode does not)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import triton_interpreter

triton_interpreter.mend()
