"""Gemma 3's greedy tokens from a real K-quantised file equal transformers', inside its windows and far beyond them.

The model has terms of its own and is not installed with the project: OCTAVO_TEST_GEMMA names a GGUF file of
gemma-3-270m.
"""

from __future__ import annotations

import os

import pytest
from greedy_reference import STORY, Reference, assert_equal_but_for_near_ties, references_of
from octavo.model.config import ModelConfig
from octavo.model.weights.open import open_weights
from octavo.model.weights.resolve import resolve_model
from octavo.scheduler.config import CacheConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.config import EngineConfig
from octavo.server.engine.inline import InlineClient
from octavo.server.engine.messages import GenerateRequest
from octavo.server.engine.startup import build_engine
from octavo.server.tokenizer import load_tokenizer

PATH = os.environ.get("OCTAVO_TEST_GEMMA")
pytestmark = pytest.mark.skipif(PATH is None, reason="OCTAVO_TEST_GEMMA names no file")

NUM_OUTPUT_TOKENS = 16
BEGINNINGS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Water boils at",
    "The three primary colours are",
    "In 1969 the first human",
    "SELECT name, COUNT(*) FROM users",
    "Once upon a time",
    "Die Hauptstadt von Deutschland",
    "To make bread you need",
]

REPEATS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17)


def make_prompts() -> list[list[int]]:
    """20 prompts: short ones, longer than a window of 512, and one of more than four windows."""
    tokenizer = load_tokenizer(resolve_model(PATH))
    texts = BEGINNINGS + [STORY * count + text for count, text in zip(REPEATS, BEGINNINGS, strict=True)]
    return [tokenizer.encode(text, add_special_tokens=True) for text in texts]


@pytest.fixture(scope="module")
def references() -> list[Reference]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    source = open_weights(str(PATH))
    spec = source.spec
    assert spec.local_rope is not None
    config = Gemma3TextConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        query_pre_attn_scalar=round(spec.attention_scale**-2),
        rms_norm_eps=spec.rms_norm_eps,
        max_position_embeddings=spec.max_position_embeddings,
        sliding_window=max(spec.windows),
        layer_types=["sliding_attention" if window else "full_attention" for window in spec.windows],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": spec.rope.theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": spec.local_rope.theta},
        },
    )
    return references_of(Gemma3ForCausalLM(config), source, make_prompts(), NUM_OUTPUT_TOKENS)


@pytest.mark.parametrize("budget", [512, 100])
def test_greedy_tokens_equal_transformers(references: list[Reference], budget: int) -> None:
    core, ready = build_engine(
        EngineConfig(
            model=ModelConfig(path=str(PATH), dtype="float32", device="cpu"),
            cache=CacheConfig(block_size=32, kv_cache_memory=2**30),
            scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget),
        )
    )
    client = InlineClient(core, ready)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    streams = [
        client.submit(GenerateRequest(request_id=str(index), prompt_token_ids=reference.prompt, params=params))
        for index, reference in enumerate(references)
    ]
    answers: list[list[int]] = [[] for _ in references]
    while not all(stream.finished for stream in streams):
        client.step()
        for answer, stream in zip(answers, streams, strict=True):
            for output in stream.take():
                assert output.error is None
                answer += output.token_ids
    assert len(references) == 20
    assert max(len(reference.prompt) for reference in references) > 4 * 512
    assert_equal_but_for_near_ties(references, answers, most=1)
