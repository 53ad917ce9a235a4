"""Settings of the whole suite."""

from __future__ import annotations

import os

# Triton kernels are tested under its interpreter, which must be chosen before anything imports triton.
os.environ["TRITON_INTERPRET"] = "1"
