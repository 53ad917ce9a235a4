"""Tokenizers from GGUF metadata and from Hugging Face directories, against transformers and by hand."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter
from octavo.model.spec import ModelError
from octavo.model.weights.resolve import ModelFiles, resolve_model
from octavo.server.tokenizer import Tokenizer, load_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

CORPUS = [
    "",
    " ",
    "Hello, world!",
    "  leading and   inner    runs\t\ttabs\n\n\nnewlines \r\n mixed \u00a0\u2003 ",
    "It's we're I'LL don't O'Neill 's",
    "naïve café Übergröße ЖЗИ 漢字かな交じり文 한국어 العربية हिन्दी ไทย",
    "🎉 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 e\u0301 \u200d \ufeff",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n\n\tif x != 3: pass",
    "a1b22c333 3.14159 1,000,000 v2.0.1 0x1F ½ ² Ⅻ ٣٤",
    "https://example.org/a?b=c&d=%20#frag user@example.com",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><|im_start|> <|im_sta rt|>",
    "\x00\x01\x7f\x80 control",
    "supercalifragilisticexpialidocious" * 5,
]


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


@pytest.mark.real_model
def test_default_model_equals_its_makers_definition(default: Tokenizer) -> None:
    """The oracle is SmolLM2's own pipeline: single digits, then GPT-2's byte-level splitting."""
    state = json.loads(default.backend.to_str())
    assert [step["type"] for step in state["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]
    for text in CORPUS:
        ids = default.encode(text, add_special_tokens=True)
        assert default.decode(ids, skip_special_tokens=False) == text
        assert b"".join(default.token_bytes(token_id) for token_id in ids) == text.encode()


@pytest.mark.real_model
def test_default_model_equals_transformers(default: Tokenizer) -> None:
    from transformers import AutoTokenizer

    path = resolve_model(None).path
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in CORPUS:
        # transformers leaves out the splitting of digits that `tokenizer.ggml.pre: smollm` stands for, which shows
        # where spaces go before numbers; letters and signs must agree.
        if any(char.isnumeric() for char in text):
            continue
        assert default.encode(text, add_special_tokens=True) == theirs(text)["input_ids"], text


@pytest.mark.real_model
def test_default_models_special_tokens(default: Tokenizer) -> None:
    assert (default.vocab_size, default.bos_token_id, default.eos_token_ids) == (49152, 1, (2, 0))
    assert (default.bos_token, default.eos_token) == ("<|im_start|>", "<|im_end|>")
    ids = default.encode("<|im_start|>hi<|im_end|>", add_special_tokens=True)
    assert ids[0] == 1
    assert ids[-1] == 2
    assert default.decode(ids, skip_special_tokens=True) == "hi"
    assert default.token_text(2) == "<|im_end|>"
    assert default.chat_template is not None


@pytest.mark.real_model
@pytest.mark.parametrize("token_id", [-1, 49152, 1 << 40])
def test_ids_outside_the_vocabulary_are_nothing(default: Tokenizer, token_id: int) -> None:
    assert default.token_bytes(token_id) == b""
    assert default.decode([token_id], skip_special_tokens=False) == ""


@pytest.mark.real_model
def test_lone_surrogates_are_a_value_error(default: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D83D\) at character 2"):
        default.encode("ab\ud83d", add_special_tokens=False)


@pytest.mark.real_model
def test_threads_agree(default: Tokenizer) -> None:
    expected = [default.encode(text, add_special_tokens=False) for text in CORPUS]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [default.encode(text, add_special_tokens=False) for text in CORPUS], range(8)):
            assert found == expected


# A small SentencePiece-like vocabulary, with bytes.
SPM_PIECES = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
SPM_WORDS = [
    "▁",
    "h",
    "e",
    "l",
    "o",
    "▁h",
    "el",
    "lo",
    "▁hel",
    "▁hello",
    "w",
    "r",
    "d",
    "or",
    "ld",
    "▁w",
    "▁wor",
    "orld",
]


# Markers of turns as converters type them: control, plain, control.
TURN_PIECES = {"<|user|>": 3, "<|end|>": 1, "<|endoftext|>": 3}


def write_spm(path: Path, kind: str = "llama", arch: str = "llama", **flags: bool) -> ModelFiles:
    pieces = [*SPM_PIECES, *SPM_WORDS, *TURN_PIECES]
    writer = GGUFWriter(str(path), arch)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(SPM_PIECES) + [-float(index) for index in range(len(SPM_WORDS) + 3)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(SPM_WORDS) + [*TURN_PIECES.values()])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(path, "gguf", "spm")


def test_sentencepiece_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_spm(tmp_path / "spm.gguf"))
    ids = tokenizer.encode("hello world é", add_special_tokens=True)
    assert ids[0] == 1
    assert tokenizer.encode("hello", add_special_tokens=False) == [len(SPM_PIECES) + SPM_WORDS.index("▁hello")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world é"
    assert tokenizer.decode(ids[1:], skip_special_tokens=True, continuation=True) == " hello world é"
    assert tokenizer.token_bytes(3 + 0xC3) == b"\xc3"
    assert tokenizer.token_bytes(ids[1]) == b" hello"
    # sentencepiece puts its space before the text even where the text begins with one
    assert tokenizer.decode(tokenizer.encode(" hello", add_special_tokens=False), skip_special_tokens=True) == " hello"


def test_sentencepiece_without_prefix_or_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_spm(tmp_path / "spm.gguf", add_space_prefix=False, add_bos_token=False))
    ids = tokenizer.encode("hello", add_special_tokens=True)
    assert tokenizer.token_text(ids[0]) == "h"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


@pytest.mark.parametrize(("arch", "swallows"), [("llama", False), ("phi3", True)])
def test_markers_of_turns(tmp_path: Path, arch: str, swallows: bool) -> None:
    """They are control tokens whatever the file types them as, and Phi-3's take the whitespace behind them."""
    tokenizer = load_tokenizer(write_spm(tmp_path / "spm.gguf", arch=arch))
    ids = tokenizer.encode("<|user|>\nhello<|end|>\nhello", add_special_tokens=False)
    pieces = [tokenizer.piece(token_id) for token_id in ids]
    gap = [] if swallows else ["▁", "<0x0A>"]
    word = ["▁hello"] if swallows else ["h", "el", "lo"]
    assert pieces == ["<|user|>", *gap, *word, "<|end|>", *gap, *word]
    assert "<" not in tokenizer.decode(ids, skip_special_tokens=True)
    kept = tokenizer.encode("<|endoftext|> hello", add_special_tokens=False)
    assert tokenizer.piece(kept[1]) == "▁"


def test_unigram_takes_the_likeliest_pieces(tmp_path: Path) -> None:
    files = write_spm(tmp_path / "spm.gguf", "t5", add_bos_token=True, remove_extra_whitespaces=True)
    tokenizer = load_tokenizer(files)
    ids = tokenizer.encode(" hello   world é ", add_special_tokens=True)
    # ▁hello is one piece of -9, its letters come to -13; ▁ and w come to -10, ▁w is -15. é is spelled by its bytes.
    assert [tokenizer.piece(token_id) for token_id in ids[:5]] == ["<s>", "▁hello", "▁", "w", "orld"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world é"
    plain = load_tokenizer(write_spm(tmp_path / "plain.gguf", "t5", add_space_prefix=False))
    assert plain.decode(plain.encode("h  e", add_special_tokens=True), skip_special_tokens=True) == "h  e"


def test_sentencepiece_merges_equal_transformers(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    tokenizer = load_tokenizer(write_spm(tmp_path / "spm.gguf"))
    pieces = SPM_PIECES + SPM_WORDS
    vocab = {piece: index for index, piece in enumerate(pieces)}
    scores = dict(
        zip(pieces, [0.0] * len(SPM_PIECES) + [-float(index) for index in range(len(SPM_WORDS))], strict=True)
    )
    theirs = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))
    for text in ("hello world", "worldhello hell", "oh hello  world", "hé🎉llo", "ldld lo"):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text


def write_bpe(path: Path, pre: str, merges: list[str] | None = None, tokens: list[str] | None = None) -> ModelFiles:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens or [*alphabet, "12", "123", "1234", "<|end|>"])
    writer.add_token_types([1] * (len(tokens or alphabet) + (0 if tokens else 3)) + ([] if tokens else [3]))
    writer.add_token_merges(merges if merges is not None else ["1 2", "12 3", "123 4"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(path, "gguf", "bpe")


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("tekken", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
        ("gpt-4o", ["123", "4"]),
        ("gpt-2", ["1234"]),
        ("never heard of", ["1234"]),
    ],
)
def test_pre_tokenizers_cut_digits_their_own_way(
    tmp_path: Path, pre: str, pieces: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(write_bpe(tmp_path / "bpe.gguf", pre))
    ids = tokenizer.encode("1234", add_special_tokens=False)
    assert [tokenizer.token_text(token_id) for token_id in ids] == pieces
    assert ("unknown pre-tokenizer" in caplog.text) == (pre == "never heard of")


@pytest.mark.parametrize(
    ("merges", "tokens"),
    [(["1 2 3"], None), (["12"], None), (["1 Q9Q"], None), (None, ["a"])],
)
def test_inconsistent_vocabularies_are_one_clear_line(
    tmp_path: Path, merges: list[str] | None, tokens: list[str] | None
) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(write_bpe(tmp_path / "bpe.gguf", "gpt-2", merges, tokens))
    assert "\n" not in str(caught.value)


def save_hf(directory: Path, config: dict[str, Any], bos_in_processor: bool = False) -> ModelFiles:
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if bos_in_processor:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelFiles(directory, "hf", "hf")


@pytest.mark.parametrize("in_processor", [False, True])
@pytest.mark.parametrize("stated", [None, False, True])
def test_bos_follows_the_config_then_the_processor(tmp_path: Path, in_processor: bool, stated: bool | None) -> None:
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    if stated is not None:
        config["add_bos_token"] = stated
    tokenizer = load_tokenizer(save_hf(tmp_path, config, in_processor))
    wanted = in_processor if stated is None else stated
    # Truncation and padding saved in the file must not reach prompts.
    assert len(tokenizer.encode("abcdef", add_special_tokens=True)) == 6 + wanted
    assert (tokenizer.encode("a", add_special_tokens=True)[0] == 256) == wanted
    assert len(tokenizer.encode("abcdef", add_special_tokens=False)) == 6
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (256, (257,))


def test_templates_and_added_tokens(tmp_path: Path) -> None:
    config = {
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
        "added_tokens_decoder": {"258": {"content": "<new>", "special": True}, "999": {"content": "<gap>"}},
    }
    files = save_hf(tmp_path, config)
    tokenizer = load_tokenizer(files)
    assert tokenizer.chat_template == "D"
    assert tokenizer.encode("<new>", add_special_tokens=False) == [258]
    (tmp_path / "chat_template.jinja").write_text("J")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_tokenizer(files).chat_template == "J"
    assert load_tokenizer(files).eos_token_ids == (7, 8)


def test_damaged_and_missing_tokenizer_files(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path, "hf", "hf")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(files)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(files)


def test_older_vocabularies_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (model / "vocab.json").write_text(json.dumps({**vocab, "ab": 256, "<|endoftext|>": 257}))
    (model / "merges.txt").write_text("#version: 0.2\na b\n")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = load_tokenizer(ModelFiles(model, "hf", "old"))
    assert tokenizer.encode("ab", add_special_tokens=False) == [256]
    assert len(list((tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json"))) == 1


def test_other_decoders_go_through_the_library(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "x": 3}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(ModelFiles(tmp_path, "hf", "wp"))
    assert tokenizer.family == "other"
    assert tokenizer.decode([1, 2, 3, 99], skip_special_tokens=True) == "playing x"
