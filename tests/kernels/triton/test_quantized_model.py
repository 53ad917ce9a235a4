"""A quantised GGUF file through the whole engine: the Triton backend keeps its matrices as they are, and says what the
reference says with the same matrices made dense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine import generate
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from octavo.kernels.triton.backend import TritonBackend
from octavo.kernels.triton.quantized import MAX_QUANTIZED_ROWS, QuantizedEmbedding, QuantizedLinear
from octavo.model.weights.open import open_weights
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.engine.messages import GenerateRequest

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 64, 96, 4, 2, 80
# As llama.cpp's mixtures do: parts of one projection of different encodings, some of them not quantised at all.
MATRICES = {
    "token_embd": ((VOCAB, HIDDEN), "Q8_0"),
    "blk.0.attn_q": ((HIDDEN, HIDDEN), "Q4_0"),
    "blk.0.attn_k": ((HIDDEN // 2, HIDDEN), "Q4_0"),
    "blk.0.attn_v": ((HIDDEN // 2, HIDDEN), "Q5_1"),
    "blk.0.attn_output": ((HIDDEN, HIDDEN), "F16"),
    "blk.0.ffn_gate": ((INNER, HIDDEN), "Q4_1"),
    "blk.0.ffn_up": ((INNER, HIDDEN), "F32"),
    "blk.0.ffn_down": ((HIDDEN, INNER), "Q5_0"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_eos_token_id(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(VOCAB)])
    random = np.random.default_rng(3)
    for name, (shape, encoding) in MATRICES.items():
        kind = GGMLQuantizationType[encoding]
        values = (random.standard_normal(shape) * 0.3).astype(np.float32)
        writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_says_the_same(file: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    # The first prompt is more rows than are multiplied by quantised matrices.
    prompts = [[(7 * i) % VOCAB for i in range(MAX_QUANTIZED_ROWS + 4)], [5, 6, 7], [11]]
    requests = [
        GenerateRequest(request_id=f"r{index}", prompt_token_ids=tokens, params=params)
        for index, tokens in enumerate(prompts)
    ]
    found, runner = generate(file, "triton", requests, max_model_len=96, budget=96, per_step=1)
    expected, _ = generate(file, "reference", requests, max_model_len=96, budget=96, per_step=1)
    assert found == expected
    assert all(len(tokens) == 5 for tokens in found.values())
    layer = runner._model._blocks[0]  # type: ignore[attr-defined]
    kinds = [type(part._packed) for part in (layer.attention._qkv, layer.mlp._gate_up, layer.mlp._down)]
    assert kinds == [QuantizedLinear] * 3
    assert not isinstance(layer.attention._output._packed, QuantizedLinear)
    assert isinstance(runner._model._embedding._packed, QuantizedEmbedding)  # type: ignore[attr-defined]


def test_bytes_of_weights_are_counted_as_they_are_kept(file: Path) -> None:
    source = open_weights(str(file), "auto")
    weights = [source.weight(name) for name in source.names()]
    for dtype in (torch.float16, torch.float32):
        backend = TritonBackend(torch.device("cpu"), dtype)
        kept = 0
        for weight in weights:
            if len(weight.shape) == 1:
                kept += backend.pack_vector(weight).nbytes
                continue
            packed = backend.pack_linear([weight])
            parts = packed.parts if isinstance(packed, QuantizedLinear) else [packed._weight]
            kept += sum(part.nbytes for part in parts)
        counted = backend.weight_bytes((weight.encoding, tuple(weight.shape)) for weight in weights)
        assert counted == kept
    dense = [("F32", (8, 32)), ("Q4_0", (64,)), ("Q4_0", (1, 8, 32))]  # the last is an expert's
    assert TritonBackend(torch.device("cpu"), torch.float16).weight_bytes(dense) == 2 * (8 * 32 + 64 + 8 * 32)
