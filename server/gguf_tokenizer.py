"""A tokenizer from a GGUF file's metadata, built directly: no conversion step, no transformers.

How each vocabulary's text is cut before merging follows llama.cpp's table of pre-tokenizers (`tokenizer.ggml.pre`),
which reproduces what each model was trained with.
"""

from __future__ import annotations

import array
import logging
from dataclasses import dataclass
from functools import partial

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..model.spec import ModelError
from ..model.weights.gguf_file import END_PIECES, GgufFile

logger = logging.getLogger(__name__)

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _PUNCTUATION_AND_SPACE
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _PUNCTUATION_AND_SPACE
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATH_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _PATH_AND_SPACE
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _PATH_AND_SPACE
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How a byte-level vocabulary cuts text before merging."""

    regex: str | None = None
    """None: GPT-2's."""
    single_digits: bool = False
    """Every digit is cut off first, on its own."""
    nfc: bool = False
    whole_words_first: bool = False
    """A piece that is itself a token is taken as it is, without merging."""
    add_bos: bool = False
    """Where the file does not say."""


_GPT2 = _Split()
_DIGITS = _Split(single_digits=True)
_SPLITS: dict[str, _Split] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2", "jina-es", "jina-de", "olmo", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        _Split(_LLAMA3, whole_words_first=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _Split(_QWEN2, nfc=True)),
    "tekken": _Split(_TEKKEN, whole_words_first=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Split(_GPT4O)),
}


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What the metadata says about text."""

    backend: Tokenizer
    pieces: list[str]
    """Index: token id."""
    add_bos: bool
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None


def build_gguf_tokenizer(file: GgufFile) -> GgufTokenizer:
    """Raises ModelError where the metadata has no tokenizer, or one of an unsupported kind."""
    kind = file.get("tokenizer.ggml.model", str, "")
    pieces = file.strings("tokenizer.ggml.tokens")
    if not pieces:
        raise ModelError(f"{file.path.name}: the file has no vocabulary; convert the model to GGUF again")
    try:
        if kind == "gpt2":
            backend, add_bos = _byte_level(file, pieces)
        elif kind == "llama":
            backend, add_bos = _sentencepiece(file, pieces), True
        elif kind == "t5":
            backend, add_bos = _unigram(file, pieces), False
        else:
            raise ModelError(
                f"{file.path.name}: the tokenizer {kind[:40]!r} is not supported (gpt2, llama and t5 are); "
                "use the model's safetensors directory"
            )
        _add_special_tokens(file, pieces, backend)
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for whatever it dislikes
        raise ModelError(
            f"{file.path.name}: the vocabulary is inconsistent ({str(error)[:120]}); convert the model to GGUF again"
        ) from error
    token_id = partial(_special_id, file, len(pieces))
    return GgufTokenizer(
        backend=backend,
        pieces=pieces,
        add_bos=_flag(file, "tokenizer.ggml.add_bos_token", add_bos),
        bos_token_id=token_id("bos_token_id"),
        eos_token_id=token_id("eos_token_id"),
        chat_template=file.get("tokenizer.chat_template", str),
    )


def _special_id(file: GgufFile, vocab_size: int, key: str) -> int | None:
    token_id = file.get(f"tokenizer.ggml.{key}", int)
    return token_id if token_id is not None and 0 <= token_id < vocab_size else None


def _flag(file: GgufFile, key: str, default: bool) -> bool:
    value = file.metadata.get(key)
    return value if isinstance(value, bool) else default


def _byte_level(file: GgufFile, pieces: list[str]) -> tuple[Tokenizer, bool]:
    """(byte-level BPE as GPT-2 introduced it, whether a BOS is added where the file does not say)."""
    name = file.get("tokenizer.ggml.pre", str, "default")
    split = _SPLITS.get(name)
    if split is None:
        logger.warning("unknown pre-tokenizer %r in %s: text is cut as for GPT-2", name[:40], file.path.name)
        split = _GPT2
    merges = _merges(file, file.strings("tokenizer.ggml.merges") or [])
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words_first))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    return backend, split.add_bos


def _merges(file: GgufFile, lines: list[str]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in lines:
        left, space, right = line.partition(" ")
        if not left or not space or not right or " " in right:
            raise ModelError(
                f"{file.path.name}: {line[:40]!r} is no merge of two pieces; convert the model to GGUF again"
            )
        merges.append((left, right))
    return merges


def _sentencepiece(file: GgufFile, pieces: list[str]) -> Tokenizer:
    """SentencePiece's BPE: no merges are stored, so they are recovered from the pieces' scores."""
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = _merges_from_scores(vocab, _scores(file, pieces))
    unknown = _special_id(file, len(pieces), "unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    _show_spaces(file, backend, [])
    return backend


def _show_spaces(file: GgufFile, backend: Tokenizer, before: list[normalizers.Normalizer]) -> None:
    """As sentencepiece does it: a space goes before the text, whatever it begins with, and every space shows as U+2581.
    `before`: what is done to a text first."""
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    ending: list[decoders.Decoder] = []
    if _flag(file, "tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        ending.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence([*before, *steps])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending])


def _scores(file: GgufFile, pieces: list[str]) -> list[float]:
    scores = file.metadata.get("tokenizer.ggml.scores")
    if scores is None or isinstance(scores, (bool, int, float, str)) or len(scores) != len(pieces):
        raise ModelError(f"{file.path.name}: the vocabulary has no scores; convert the model to GGUF again")
    return [float(score) for score in scores]


def _unigram(file: GgufFile, pieces: list[str]) -> Tokenizer:
    """SentencePiece's unigram model (Kudo 2018): the likeliest way to cut a text, by the pieces' log probabilities."""
    unknown = _special_id(file, len(pieces), "unknown_token_id")
    has_bytes = "<0x00>" in pieces
    vocab = list(zip(pieces, _scores(file, pieces), strict=True))
    backend = Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=has_bytes))
    before: list[normalizers.Normalizer] = []
    charsmap = file.metadata.get("tokenizer.ggml.precompiled_charsmap")
    if isinstance(charsmap, array.array) and len(charsmap):
        before.append(normalizers.Precompiled(bytes(byte & 0xFF for byte in charsmap)))
    if _flag(file, "tokenizer.ggml.remove_extra_whitespaces", False):
        before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    _show_spaces(file, backend, before)
    return backend


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others, best score first (as transformers' generate_merges orders them)."""
    found: list[tuple[float, str, str]] = []
    for piece, token_id in vocab.items():
        score = scores[token_id]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((score, left, right))
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def _add_special_tokens(file: GgufFile, pieces: list[str], backend: Tokenizer) -> None:
    """Control tokens are special (hidden on request); user-defined ones are text that is never cut."""
    types = file.metadata.get("tokenizer.ggml.token_type")
    if types is None or isinstance(types, (bool, int, float, str)) or len(types) != len(pieces):
        ids = (_special_id(file, len(pieces), f"{name}_token_id") for name in ("unknown", "bos", "eos"))
        special = [pieces[token_id] for token_id in ids if token_id is not None]
        plain: list[str] = []
    else:
        hidden = [
            kind in (_CONTROL, _UNKNOWN) or piece in END_PIECES for kind, piece in zip(types, pieces, strict=True)
        ]
        special = [piece for piece, is_hidden in zip(pieces, hidden, strict=True) if is_hidden]
        plain = [
            piece
            for kind, piece, is_hidden in zip(types, pieces, hidden, strict=True)
            if kind == _USER_DEFINED and not is_hidden
        ]
    # Phi-3's swallow the whitespace behind them, which its GGUF files do not say.
    swallows = file.get("general.architecture", str) == "phi3" and file.get("tokenizer.ggml.model", str) == "llama"
    backend.add_special_tokens(
        [
            AddedToken(piece, normalized=False, special=True, rstrip=swallows and piece not in _KEEP_SPACE)
            for piece in special
            if piece
        ]
    )
    backend.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in plain if piece])
