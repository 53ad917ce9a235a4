"""One module per subcommand: `add_parser` declares its arguments, and sets as `run` what carries it out.

All of them are imported by every start of `octavo`, so what is heavy is imported inside `run`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]
