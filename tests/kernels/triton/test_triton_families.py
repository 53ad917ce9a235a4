"""What some families ask of the GPU's backend beyond Llama, through the engine and under the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine import generate
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.engine.messages import GenerateRequest
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen2Config, Qwen2ForCausalLM

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "experts": (OlmoeForCausalLM, OlmoeConfig(**SHAPE, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)),
    # The layer without a window and the one with it are two groups, with a plan each.
    "windows": (
        Qwen2ForCausalLM,
        Qwen2Config(**SHAPE, num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_answers_equal_the_reference_backends(tmp_path: Path, case: str) -> None:
    family, config = MODELS[case]
    torch.manual_seed(0)
    family(config).save_pretrained(tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    requests = [
        GenerateRequest(
            request_id=f"r{length}", prompt_token_ids=[3 + 7 * i % 60 for i in range(length)], params=params
        )
        for length in (1, 40, 14)
    ]
    found, runner = generate(tmp_path, "triton", requests, max_model_len=64, budget=32, per_step=2)
    expected, _ = generate(tmp_path, "reference", requests, max_model_len=64, budget=32, per_step=2)
    assert runner.runs_ahead
    assert found == expected
    assert all(len(tokens) == 6 for tokens in found.values())
