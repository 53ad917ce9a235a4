"""Text as it streams equals text decoded at once, whatever the tokens."""

from __future__ import annotations

import codecs

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.model.weights.resolve import resolve_model
from octavo.server.detokenizer import Detokenizer
from octavo.server.tokenizer import Tokenizer, load_tokenizer
from tokenizers import AddedToken, decoders, models


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


def sentencepiece() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "▁a", "é", "▁▁"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return Tokenizer(backend, bos_token_id=1, eos_token_ids=[2])


def wordpiece() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "x": 3}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend, bos_token_id=None, eos_token_ids=[])


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int], *, tail: list[int], skip: bool) -> str:
    detokenizer = Detokenizer(tokenizer, tail, skip)
    pieces, start = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(detokenizer.push(ids[start : start + size]))
        start += size
    return "".join(pieces) + detokenizer.flush()


# Ids below 300 are the special tokens and single bytes, where the trouble is.
IDS = st.lists(st.integers(0, 300) | st.integers(0, 49151) | st.sampled_from([-1, 60000]), max_size=40)
SIZES = st.lists(st.integers(0, 4), max_size=20)


@pytest.mark.real_model
@settings(max_examples=500, deadline=None)
@given(ids=IDS, sizes=SIZES, skip=st.booleans())
def test_default_model_streams_what_it_decodes(
    default: Tokenizer, ids: list[int], sizes: list[int], skip: bool
) -> None:
    expected = default.decode(ids, skip_special_tokens=skip)
    assert stream(default, ids, sizes, tail=[], skip=skip) == expected
    assert stream(default, ids, sizes, tail=[5], skip=skip) == expected
    known = [token_id for token_id in ids if 0 <= token_id < default.vocab_size]
    assert default.backend.decode(known, skip_special_tokens=skip) == expected


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 265), max_size=30), sizes=SIZES, skip=st.booleans(), has_prompt=st.booleans())
def test_sentencepiece_streams_what_it_decodes(ids: list[int], sizes: list[int], skip: bool, has_prompt: bool) -> None:
    tokenizer = sentencepiece()
    expected = tokenizer.decode(ids, skip_special_tokens=skip, continuation=has_prompt)
    assert stream(tokenizer, ids, sizes, tail=[1] * has_prompt, skip=skip) == expected


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20), sizes=SIZES)
def test_sentencepiece_equals_the_library_on_valid_text(text: str, sizes: list[int]) -> None:
    tokenizer = sentencepiece()
    ids = [3 + byte for byte in text.encode()]
    assert stream(tokenizer, ids, sizes, tail=[], skip=True) == tokenizer.backend.decode(ids)


@pytest.mark.real_model
@pytest.mark.parametrize("text", ["👩‍👩‍👧‍👦", "🏳️‍🌈 e\u0301", "a🎉b", "漢字", "ÿ"])
def test_characters_are_never_torn(default: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(default, [1], skip_special_tokens=True)
    pieces = [detokenizer.push([token_id]) for token_id in default.encode(text, add_special_tokens=False)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


@pytest.mark.real_model
def test_a_character_held_back_is_flushed_as_a_replacement(default: Tokenizer) -> None:
    first = default.encode("🎉", add_special_tokens=False)[0]
    detokenizer = Detokenizer(default, [1], skip_special_tokens=True)
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == codecs.decode(default.token_bytes(first), "utf-8", "replace") == "\ufffd"


@pytest.mark.real_model
def test_special_tokens_in_the_middle(default: Tokenizer) -> None:
    ids = default.encode("a<|im_end|>b", add_special_tokens=False)
    assert stream(default, ids, [1] * 9, tail=[1], skip=True) == "ab"
    assert stream(default, ids, [1] * 9, tail=[1], skip=False) == "a<|im_end|>b"


def test_other_decoders_stream_by_window() -> None:
    tokenizer = wordpiece()
    assert stream(tokenizer, [1, 2, 3, 1], [1] * 9, tail=[], skip=True) == "playing x play"
    assert stream(tokenizer, [2, 3], [1] * 9, tail=[1], skip=True) == "ing x"
