"""The default model's greedy tokens equal transformers', whatever the engine does around them."""

from __future__ import annotations

import random

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
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.real_model

NUM_OUTPUT_TOKENS = 24
MAX_IN_FLIGHT = 16
PARTS = [
    "What is the capital of France?",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Water boils at",
    "The three primary colours are",
    "Translate to German: good morning, my friend.",
    "SELECT name, COUNT(*) FROM users",
    "Once upon a time",
]


def make_prompts() -> list[list[int]]:
    """24 prompts of 3 to about 330 tokens; a third of them begin alike."""
    tokenizer = load_tokenizer(resolve_model(None))
    sentences = [sentence + "." for sentence in STORY.split(".") if sentence.strip()]
    texts = list(PARTS)
    texts += [STORY + part for part in PARTS]
    texts += ["".join(sentences[i % 5 :]) * (1 + i % 2) + PARTS[i] for i in range(8)]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


@pytest.fixture(scope="module")
def references() -> list[Reference]:
    source = open_weights(str(resolve_model(None).path))
    spec = source.spec
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        max_position_embeddings=spec.max_position_embeddings,
        tie_word_embeddings=spec.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
    )
    return references_of(LlamaForCausalLM(config), source, make_prompts(), NUM_OUTPUT_TOKENS)


CASES = {
    "block 16, cache on": {"block_size": 16},
    "block 32, cache on": {"block_size": 32},
    "block 16, cache off": {"block_size": 16, "caching": False},
    "block 32, cache off": {"block_size": 32, "caching": False},
    "chunks of 24 tokens": {"block_size": 32, "budget": 24},
    "small pool": {"block_size": 16, "pool_tokens": 416},
    "small pool, small chunks, cache off": {"block_size": 16, "pool_tokens": 416, "budget": 40, "caching": False},
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(case: str, references: list[Reference]) -> None:
    settings = CASES[case]
    block_size = int(settings["block_size"])
    pool_tokens = int(settings.get("pool_tokens", 16384))
    bytes_per_token = 30 * 2 * 3 * 64 * 4
    core, ready = build_engine(
        EngineConfig(
            model=ModelConfig(path=str(resolve_model(None).path), dtype="float32", device="cpu"),
            cache=CacheConfig(
                block_size=block_size,
                kv_cache_memory=(pool_tokens + block_size) * bytes_per_token,
                enable_prefix_caching=bool(settings.get("caching", True)),
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=MAX_IN_FLIGHT, max_num_batched_tokens=int(settings.get("budget", 512))
            ),
        )
    )
    outputs = run(InlineClient(core, ready), references)

    assert_equal_but_for_near_ties(references, outputs, most=2)
    counters = core.scheduler.counters
    assert (counters.num_preemptions > 0) == ("pool_tokens" in settings)
    assert (counters.prefix_cache_hits > 0) == bool(settings.get("caching", True))
    core.idle()
    assert core.scheduler.blocks.counts().num_free == ready.num_blocks


def run(client: InlineClient, references: list[Reference]) -> list[list[int]]:
    """Send the prompts at random moments, at most 16 at once, and collect their tokens."""
    moments = random.Random(7)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    outputs: list[list[int]] = [[] for _ in references]
    todo = list(enumerate(references))
    moments.shuffle(todo)
    streams = {}
    while todo or streams:
        while todo and len(streams) < MAX_IN_FLIGHT and moments.random() < 0.5:
            index, reference = todo.pop()
            request = GenerateRequest(request_id=str(index), prompt_token_ids=reference.prompt, params=params)
            streams[index] = client.submit(request)
        client.step()
        for index, stream in list(streams.items()):
            for output in stream.take():
                assert output.error is None
                outputs[index] += output.token_ids
            if stream.finished:
                del streams[index]
    return outputs
