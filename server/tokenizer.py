"""Text to token ids and back, in the HTTP process: the `tokenizers` library, never torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

import tokenizers

from ..model.weights.gguf_file import GgufFile
from ..model.weights.gguf_spec import read_eos_ids
from ..model.weights.resolve import ModelFiles
from .gguf_tokenizer import build_gguf_tokenizer
from .hf_tokenizer import load_hf_tokenizer

Family = Literal["byte_level", "sentencepiece", "other"]
"""How pieces stand for bytes: GPT-2's alphabet; SentencePiece with byte fallback; neither."""


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte → the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


_GPT2_BYTES = _gpt2_alphabet()


class _BytesTable(dict[int, bytes]):
    """Token id → its bytes, filled as ids are met: building all of it would take longer than loading the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes:
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return b""  # not kept: ids outside the vocabulary must not make the table grow
        value = self[token_id] = self._tokenizer.piece_bytes(token_id, piece)
        return value


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads: nothing changes later but a cache."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
        eos_token_id: int | None = None,
        add_bos: bool | None = None,
        chat_template: str | None = None,
        pieces: list[str] | None = None,
    ) -> None:
        """add_bos: whether `add_special_tokens` puts a BOS first; None leaves it to the backend's post-processor.

        pieces: the vocabulary by id, where the backend's own cannot be trusted to know every id.
        """
        # Settings for training that some files carry; here they would cut or pad prompts in silence.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._pieces = pieces
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size = max(
            backend.get_vocab_size(with_added_tokens=True), len(pieces or ()), max(self._added, default=-1) + 1
        )
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token = self.piece(bos_token_id) if bos_token_id is not None else None
        if eos_token_id is None and self.eos_token_ids:
            eos_token_id = self.eos_token_ids[0]
        self.eos_token = self.piece(eos_token_id) if eos_token_id is not None else None
        self.chat_template = chat_template
        self.family, self.strips_leading_space = _classify(backend)
        self._bytes = _BytesTable(self)
        self._visible_bytes = _VisibleBytes(self)
        self._post_process, self._prepended = self._plan_special_tokens(add_bos)

    def _plan_special_tokens(self, add_bos: bool | None) -> tuple[bool, list[int]]:
        """(whether the backend's post-processor runs, ids put first by hand) for `add_special_tokens=True`."""
        if add_bos is None or self.bos_token_id is None:
            return True, []
        probe = self.backend.encode("a", add_special_tokens=True).ids
        processor_adds = probe[:1] == [self.bos_token_id]
        if add_bos:
            return True, [] if processor_adds else [self.bos_token_id]
        return not processor_adds, []

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it become their ids.

        Raises ValueError for text that is not Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: a lone surrogate (U+{ord(text[error.start]):04X}) at character "
                f"{error.start}"
            ) from None
        process = add_special_tokens and self._post_process
        # The batch call releases the GIL, so a long text on a thread does not pause everybody's streams; "fast" leaves
        # out the character offsets, which nobody reads here.
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=process)[0].ids
        return self._prepended + ids if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool, continuation: bool = False) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are passed over.

        continuation: the ids follow others, so the space that SentencePiece puts before the first word is kept.
        """
        if self.family == "other":
            known = [token_id for token_id in ids if self.piece(token_id) is not None]
            text: str = self.backend.decode(known, skip_special_tokens=skip_special_tokens)
            return text
        table = self.bytes_table(skip_special_tokens)
        text = b"".join([table[token_id] for token_id in ids]).decode("utf-8", "replace")
        if self.strips_leading_space and not continuation:
            return text.removeprefix(" ")
        return text

    def bytes_table(self, skip_special_tokens: bool) -> dict[int, bytes]:
        """Token id → bytes, to be subscripted only; the hot path of detokenising. Special tokens as b"" if skipped."""
        return self._visible_bytes if skip_special_tokens else self._bytes

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for; b"" for an id outside the vocabulary."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token's text; bytes that are no UTF-8 of their own become U+FFFD."""
        return self._bytes[token_id].decode("utf-8", "replace")

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            return None
        if token_id in self._added:
            return self._added[token_id]
        if self._pieces is not None and token_id < len(self._pieces):
            return self._pieces[token_id]
        piece: str | None = self.backend.id_to_token(token_id)
        return piece

    def piece_bytes(self, token_id: int, piece: str) -> bytes:
        """What `piece` stands for in this family."""
        if self.family == "byte_level" and token_id not in self._added:
            try:
                return bytes([_GPT2_BYTES[char] for char in piece])
            except KeyError:
                return piece.encode()
        if self.family == "sentencepiece":
            byte = _fallback_byte(piece)
            return piece.replace("▁", " ").encode() if byte is None else byte
        return piece.encode()


class _VisibleBytes(dict[int, bytes]):
    """The same table with special tokens left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(dict.fromkeys(tokenizer.special_token_ids, b""))
        self._all = tokenizer.bytes_table(skip_special_tokens=False)

    def __missing__(self, token_id: int) -> bytes:
        value = self._all[token_id]
        if value:
            self[token_id] = value
        return value


def _fallback_byte(piece: str) -> bytes | None:
    """SentencePiece spells a byte without a piece of its own <0xHH>."""
    if len(piece) != 6 or not piece.startswith("<0x") or piece[5] != ">":
        return None
    try:
        return bytes([int(piece[3:5], 16)])
    except ValueError:
        return None


def _classify(backend: tokenizers.Tokenizer) -> tuple[Family, bool]:
    """(family, whether decoding strips one leading space), read off the backend's decoder."""
    if backend.decoder is None:
        return "other", False
    steps = _flatten(json.loads(backend.decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte_level", False
    if not {"Replace", "Metaspace"} & set(kinds) or not set(kinds) <= {
        "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace",
    }:  # fmt: skip
        return "other", False
    strips = False
    for step in steps:
        if step["type"] == "Replace" and (step["pattern"] != {"String": "▁"} or step["content"] != " "):
            return "other", False
        if step["type"] == "Metaspace":
            if step.get("replacement") != "▁":
                return "other", False
            strips = strips or step.get("prepend_scheme", "always") != "never"
        if step["type"] == "Strip":
            if (step["content"], step["start"], step["stop"]) != (" ", 1, 0):
                return "other", False
            strips = True
    return "sentencepiece", strips


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flatten(inner)]


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer that comes with a model. Raises ModelError with one line where there is none that can be used."""
    if files.kind == "hf":
        loaded = load_hf_tokenizer(files.path)
        return Tokenizer(
            loaded.backend,
            bos_token_id=loaded.bos_token_id,
            eos_token_ids=loaded.eos_token_ids,
            eos_token_id=loaded.eos_token_id,
            add_bos=loaded.add_bos,
            chat_template=loaded.chat_template,
        )
    file = GgufFile(files.path)
    try:
        built = build_gguf_tokenizer(file)
        return Tokenizer(
            built.backend,
            bos_token_id=built.bos_token_id,
            eos_token_ids=read_eos_ids(file, len(built.pieces)),
            eos_token_id=built.eos_token_id,
            add_bos=built.add_bos,
            chat_template=built.chat_template,
            pieces=built.pieces,
        )
    finally:
        file.close()
