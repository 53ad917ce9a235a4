"""config.json with checked access. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..spec import ModelError
from ..text import one_line


class HfConfig:
    """A field of the wrong type is a ModelError here, not a surprise later."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def fail(self, what: str, mend: str = "choose another model") -> NoReturn:
        raise ModelError(f"{self.path.parent.name}/{self.path.name}: {what}; {mend}")

    def with_defaults(self, defaults: Mapping[str, Any]) -> HfConfig:
        """What is absent is taken from `defaults`; what is null stays so."""
        return HfConfig(self.path, {**defaults, **self.values})

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            self.fail(
                f"{key} is missing (architecture {self.architecture})", "check that the architecture is supported"
            )
        if type(value) is not int:
            self.fail(f"{key} should be an integer, not {str(value)[:40]!r}", "download the model again")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            self.fail(f"{key} should be a number, not {str(value)[:40]!r}", "download the model again")
        return float(value)

    def positive(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if not value > 0:
            self.fail(f"{key} should be positive, not {value}", "download the model again")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers, which must be there."""
        values = self.values.get(key)
        if not isinstance(values, list) or not all(
            type(value) in (int, float) and math.isfinite(value) and value > 0 for value in values
        ):
            self.fail(f"{key} should be a list of positive numbers", "download the model again")
        return tuple(float(value) for value in values)

    def flag(self, key: str) -> bool:
        return self.values.get(key) is True

    def section(self, key: str) -> HfConfig | None:
        """A nested object, None where absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(f"{key} should be an object", "download the model again")
        return HfConfig(self.path, value)

    @property
    def architecture(self) -> str:
        names = self.values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            return "unknown"
        return one_line(names[0], 80)
