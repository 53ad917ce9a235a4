"""What Triton's interpreter needs to be usable here. It is for tests only, and so is this."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Call once, before the first launch."""
    if hasattr(interpreter, "_patch_lang"):
        _patch_the_language_once_a_launch()
    if hasattr(interpreter, "_patch_lang_tensor"):
        _let_tensors_end_a_range()


def _patch_the_language_once_a_launch() -> None:
    """The interpreter patches triton.language anew for every call of a function by a kernel, tl.sum and tl.zeros
    included: half of its time. Once in a launch is enough, for each way in which functions know the language."""
    plain_patch, plain_run = interpreter._patch_lang, interpreter.InterpretedFunction.run
    patched = set[tuple[bool, bool]]()

    def patch(fn: Any) -> Any:
        names = tuple(any(value is module for value in fn.__globals__.values()) for module in (tl, tl.core))
        if names in patched:
            return None
        patched.add(names)
        return plain_patch(fn)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return plain_run(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.InterpretedFunction.run = patch, run


def _let_tensors_end_a_range() -> None:
    """Up to Triton 3.6, `range(0, length)` makes an integer of an array of one element, which numpy 2.4 refuses."""
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        plain(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch
