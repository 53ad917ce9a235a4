"""What comes from a server or a file, made fit for a terminal: anybody may have written it. Torch-free."""

from __future__ import annotations

# C0 and C1 control characters and DEL: without them no escape sequence begins. Newline and tab are text. Halves of
# surrogate pairs, which JSON can carry, cannot be encoded.
_REPLACED: dict[int, str | None] = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)))
del _REPLACED[ord("\n")], _REPLACED[ord("\t")]
_REPLACED.update(dict.fromkeys(range(0xD800, 0xE000), "\ufffd"))


def printable(text: str) -> str:
    """The text without what a terminal would act on."""
    return text.translate(_REPLACED)


def one_line(text: str, max_chars: int = 500) -> str:
    """Printable, in one line of bounded length."""
    line = " ".join(printable(text).split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def without_surrogates(text: str) -> str:
    """What was typed, as valid Unicode: bytes that were no UTF-8 arrive from the terminal as lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")
