"""What headers tell of models that this release serves, and of those that it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from octavo.model.header import ModelHeader, read_header
from octavo.model.spec import ModelError
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as TransformersLlama

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
GEMMA_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def write_config(directory: Path, values: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def windows(header: ModelHeader) -> list[int | None]:
    """Layer by layer."""
    found = {index: group.layer.window for group in header.kv_layout.groups for index in group.layer_ids}
    return [found[index] for index in range(header.kv_layout.num_layers)]


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_config_alone_tells_all_of_a_served_model(tmp_path: Path, name: str) -> None:
    header = read_header(str(write_config(tmp_path / "llama-8b", LLAMA_8B) / name))
    assert (header.name, header.read, header.refusal, header.stored_bytes) == ("llama-8b", "config.json", None, None)
    assert header.num_parameters == 8_030_261_248  # what its makers state
    assert header.kv_layout.block_bytes(1, 2) == 128 * 2**10
    assert header.spec.eos_token_ids == (128001, 128008, 128009)


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    tied = read_header(str(write_config(tmp_path / "tied", LLAMA_8B | {"tie_word_embeddings": True})))
    assert tied.num_parameters == 8_030_261_248 - 128256 * 4096


def test_an_index_beside_the_config_tells_the_stored_size(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "m", LLAMA_8B)
    index = {"metadata": {"total_size": 16_060_522_496}, "weight_map": {"model.norm.weight": "m-1.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_header(str(directory)).stored_bytes == 16_060_522_496


def test_gemma_3_1b_is_planned_with_its_windows(tmp_path: Path) -> None:
    header = read_header(str(write_config(tmp_path / "gemma", GEMMA_1B)))
    assert header.num_parameters == 999_885_952  # transformers' Gemma3ForCausalLM
    assert windows(header) == [None if index % 6 == 5 else 512 for index in range(26)]
    assert header.kv_layout.block_bytes(1, 2) == 26 * 2 * 256 * 2
    assert header.refusal is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, [64] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64}, [None] * 4),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            [None, 64, 64, 64],
        ),
        ({"model_type": "not-known", "sliding_window": 64, "sliding_window_pattern": 2}, [64, None, 64, None]),
        (
            {"model_type": "not-known", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            [None, None, None, 8],
        ),
        (
            {
                "model_type": "not-known",
                "layer_types": ["full_attention", "sliding_attention", "chunked_attention", "full_attention"],
                "sliding_window": 32,
                "attention_chunk_size": 16,
            },
            [None, 32, 16, None],
        ),
        ({"model_type": "not-known", "text_config": {"sliding_window": 128}}, [128] * 4),
    ],
)
def test_windows_are_read_however_a_config_states_them(
    tmp_path: Path, settings: dict[str, Any], expected: list[int | None]
) -> None:
    directory = write_config(tmp_path / "m", SMALL | {"architectures": ["OtherForCausalLM"]} | settings)
    save_file({"model.embed_tokens.weight": torch.zeros(100, 64)}, directory / "model.safetensors")
    header = read_header(str(directory))
    assert windows(header) == expected
    assert header.num_parameters == 6400
    assert header.spec.max_position_embeddings == 4096


def test_a_name_that_a_terminal_would_act_on_is_made_harmless(tmp_path: Path) -> None:
    hostile = "Evil\x1b]0;owned\x07\nForCausalLM"
    directory = write_config(tmp_path / "m", SMALL | {"architectures": [hostile]})
    save_file({"model.embed_tokens.weight": torch.zeros(100, 64)}, directory / "model.safetensors")
    write_gguf(tmp_path / "m.gguf", arch=hostile)
    for name in (directory, tmp_path / "m.gguf"):
        header = read_header(str(name))
        assert header.spec.architecture == "Evil]0;owned ForCausalLM"
        assert header.refusal is not None
        assert header.refusal.isprintable()


def test_settings_under_an_architectures_own_names_are_found(tmp_path: Path) -> None:
    """GPT-2's config, as its makers wrote it: n_layer for num_hidden_layers, and no size of the product between."""
    sizes = {"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
    values = sizes | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    header = read_header(str(write_config(tmp_path / "gpt2", values)))
    assert header.num_parameters == 124_439_808
    assert header.kv_layout.block_bytes(1, 2) == 12 * 2 * 768 * 2
    assert (header.spec.max_position_embeddings, header.spec.intermediate_size) == (1024, 3072)
    assert header.refusal is not None


@pytest.mark.parametrize(
    ("settings", "num_kv_heads"),
    [
        ({"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "n_head": 4, "n_embd": 64}, 1),
        ({"architectures": ["FalconForCausalLM"], "model_type": "falcon", "multi_query": True}, 1),
        (
            {
                "architectures": ["FalconForCausalLM"],
                "model_type": "falcon",
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
            },
            2,
        ),
    ],
)
def test_heads_that_share_keys_and_values_are_counted_once(
    tmp_path: Path, settings: dict[str, Any], num_kv_heads: int
) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}
    header = read_header(str(write_config(tmp_path / "m", shape | settings)))
    assert header.spec.num_key_value_heads == num_kv_heads
    assert header.kv_layout.block_bytes(1, 2) == header.kv_layout.num_layers * 2 * num_kv_heads * 16 * 2


def test_experts_are_all_weights(tmp_path: Path) -> None:
    values = SMALL | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8}
    header = read_header(str(write_config(tmp_path / "m", values)))
    attention = 2 * 64 * 64 + 2 * 64 * 32
    assert header.num_parameters == 2 * 100 * 64 + 64 + 4 * (attention + 8 * 3 * 64 * 128 + 8 * 64 + 2 * 64)


def test_quantised_weights_are_counted_as_the_model_has_them(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "m", SMALL | LLAMA_NAMES | {"quantization_config": {"quant_method": "hqq"}})
    save_file({"packed": torch.zeros(3, dtype=torch.int32)}, directory / "model.safetensors")
    plain = read_header(str(write_config(tmp_path / "plain", SMALL | LLAMA_NAMES)))
    packed = read_header(str(directory))
    assert packed.num_parameters == plain.num_parameters
    assert plain.refusal is None
    assert packed.refusal is not None
    assert packed.refusal.startswith("octavo serve refuses it: ")
    assert "quantised" in packed.refusal


LLAMA_NAMES = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}


def test_a_saved_model_and_its_config_alone_tell_the_same(
    tmp_path: Path, llama_config: Callable[..., LlamaConfig]
) -> None:
    torch.manual_seed(0)
    TransformersLlama(llama_config(tie_word_embeddings=False)).save_pretrained(tmp_path / "whole")
    bare = write_config(tmp_path / "bare", json.loads((tmp_path / "whole/config.json").read_text()))
    whole, alone = read_header(str(tmp_path / "whole")), read_header(str(bare))
    assert (whole.spec, whole.num_parameters) == (alone.spec, alone.num_parameters)
    assert whole.stored_bytes == (tmp_path / "whole/model.safetensors").stat().st_size
    assert whole.read == "config.json and the headers of the safetensors"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"layer_types": ["linear_attention"] * 4}, "a layer of the kind 'linear_attention'"),
        ({"mamba_d_state": 16}, "keep a state instead of keys and values"),
        ({"is_encoder_decoder": True}, "choose a decoder-only model"),
        ({"layer_types": ["full_attention"]}, "1 entries for 4 layers"),
        ({"num_hidden_layers": 10**9}, "the number of layers is 1000000000"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers should be an integer, not 'many'"),
        ({"num_kv_shared_layers": 4}, "4 of 4 layers share K/V"),
        ({}, "the parameters cannot be counted from config.json"),
    ],
)
def test_what_cannot_be_known_is_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    values = SMALL | {"architectures": ["OtherForCausalLM"], "model_type": "not-known"} | settings
    with pytest.raises(ModelError, match=message) as caught:
        read_header(str(write_config(tmp_path / "m", values)))
    assert "\n" not in str(caught.value)


def write_gguf(
    path: Path, arch: str, extra: Callable[[GGUFWriter], None] | None = None, lack: Collection[str] = ()
) -> Path:
    """A header of four layers over a few tensors; 2 K/V heads of 16."""
    writer = GGUFWriter(str(path), arch)
    writer.add_block_count(4)
    writer.add_context_length(4096)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    if "head_count_kv" not in lack:
        writer.add_head_count_kv(2)
    if extra is not None:
        extra(writer)
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float32))
    writer.add_tensor("blk.0.anything.weight", np.zeros((8, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("arch", "extra", "expected"),
    [
        ("gemma3", lambda w: w.add_uint32("gemma3.attention.sliding_window", 512), [512] * 4),
        ("gemma2", lambda w: w.add_uint32("gemma2.attention.sliding_window", 512), [512, None, 512, None]),
        ("qwen2", lambda w: None, [None] * 4),
        (
            "other",
            lambda w: (
                w.add_uint32("other.attention.sliding_window", 512),
                w.add_array("other.attention.sliding_window_pattern", [True, False, False, True]),
            ),
            [512, None, None, 512],
        ),
        (
            "other",
            lambda w: (
                w.add_uint32("other.attention.sliding_window", 512),
                w.add_uint32("other.attention.sliding_window_pattern", 4),
            ),
            [512, 512, 512, None],
        ),
    ],
)
def test_any_gguf_header_is_read(
    tmp_path: Path, arch: str, extra: Callable[[GGUFWriter], None], expected: list[int | None]
) -> None:
    path = write_gguf(tmp_path / "m.gguf", arch, extra)
    header = read_header(str(path))
    assert windows(header) == expected
    assert header.num_parameters == 6400 + 256
    assert header.stored_bytes == path.stat().st_size
    assert header.kv_layout.block_bytes(1, 2) == 4 * 2 * 2 * 16 * 2
    assert header.refusal is not None
    known = {"gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}.get(arch)
    why = f"not part of a {known}" if known else f"does not serve {arch} yet"
    assert why in header.refusal
    assert header.notes == ()


def test_heads_may_differ_between_the_layers_of_a_gguf(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_array("other.attention.head_count_kv", [1, 1, 2, 4])
        writer.add_uint32("other.attention.value_length", 8)

    header = read_header(str(write_gguf(tmp_path / "m.gguf", "other", extra, lack={"head_count_kv"})))
    assert header.kv_layout.block_bytes(1, 2) == (1 + 1 + 2 + 4) * (16 + 8) * 2


def test_windows_of_unknown_place_count_in_full_with_a_note(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "other", lambda w: w.add_uint32("other.attention.sliding_window", 512))
    header = read_header(str(path))
    assert windows(header) == [None] * 4
    assert header.notes == (
        "some layers attend to a window of 512 tokens, the header does not say which: all count in full",
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_uint32("other.attention.kv_lora_rank", 512), "multi-head latent attention"),
        (lambda w: w.add_uint32("other.ssm.state_size", 16), "keeps a state instead of keys and values"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts of a model; merge them"),
        (lambda w: w.add_array("other.attention.head_count_kv", [2, 0, 2, 0]), "keep a state instead"),
        (lambda w: w.add_array("other.attention.head_count_kv", [2, 2]), "2 entries for 4 layers"),
    ],
)
def test_a_gguf_of_another_kind_of_memory_is_refused(
    tmp_path: Path, extra: Callable[[GGUFWriter], None], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_header(str(write_gguf(tmp_path / "m.gguf", "other", extra, lack={"head_count_kv"})))


def test_a_cut_file_is_as_damaged_for_the_plan_as_for_the_server(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "other")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="lies past the end of the file"):
        read_header(str(path))
