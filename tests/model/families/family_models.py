"""Tiny seeded models of transformers, one or more of each family, and what it takes to compare an engine with them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from octavo.model.config import ModelConfig
from octavo.scheduler.config import CacheConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.config import EngineConfig
from octavo.server.engine.core import EngineCore
from octavo.server.engine.inline import InlineClient
from octavo.server.engine.messages import GenerateRequest
from octavo.server.engine.startup import build_engine

VOCAB = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2}
GEMMA: dict[str, Any] = {
    "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 20, "num_hidden_layers": 4,
}  # fmt: skip


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def longrope(dims: int, **more: Any) -> dict[str, Any]:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(dims)], "long_factor": [2.0 + i for i in range(dims)]}
    return {**rope("longrope", **factors, **more), "original_max_position_embeddings": 64}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 24, "head_dim": 16}),
    "mistral without window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen2 yarn": ("Qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    "gemma3": (
        "Gemma3Text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 40}),
    "phi3 longrope": ("Phi3", longrope(8)),
    "phi4 mini": ("Phi3", longrope(6, partial_rotary_factor=0.75)),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 0.25},
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        {**MOE, "moe_intermediate_size": 48, "norm_topk_prob": True, "head_dim": 32, "mlp_only_layers": [1]},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 24}),
    "olmoe": ("Olmoe", {**MOE, "num_experts_per_tok": 3}),
}
"""Name → transformers' name of the configuration, without `Config`, and its settings beyond the common ones."""


@dataclass(frozen=True)
class Family:
    """A model of transformers and the directory it was saved to."""

    oracle: Any
    directory: Path

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """At every position. fp32 [num_tokens, vocab]"""
        with torch.inference_mode():
            logits: torch.Tensor = self.oracle(torch.tensor([list(token_ids)])).logits[0]
        return logits.float()


def save_family(case: str, directory: Path, **changes: Any) -> Family:
    """Norms and biases are drawn too, so that none of them can be left out unnoticed."""
    name, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **settings, **changes})
    torch.manual_seed(0)
    oracle = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in oracle.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "gate.weight" in parameter_name:
                parameter.normal_(std=0.3)
    oracle.save_pretrained(directory)
    return Family(oracle, directory)


@dataclass
class Answer:
    token_ids: list[int]
    logprobs: list[dict[int, float]]
    """Of each token: natural log of the probabilities of the likeliest tokens."""
    num_cached: int = 0


@dataclass
class Engine:
    core: EngineCore
    client: InlineClient
    notes: list[str]

    def answer(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, seed: int = 0) -> list[Answer]:
        """Send the prompts at random moments, so that prompts and decodes mix; greedy."""
        moments = random.Random(seed)
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=8)
        answers = [Answer([], []) for _ in prompts]
        todo, streams = list(enumerate(prompts)), {}
        while todo or streams:
            while todo and moments.random() < 0.5:
                index, prompt = todo.pop(0)
                request = GenerateRequest(request_id=str(index), prompt_token_ids=list(prompt), params=params)
                streams[index] = self.client.submit(request)
            self.client.step()
            for index, stream in list(streams.items()):
                for output in stream.take():
                    assert output.error is None, output.error
                    answers[index].token_ids += output.token_ids
                    answers[index].num_cached = max(answers[index].num_cached, output.num_cached_tokens)
                    for entry in output.logprobs or []:
                        answers[index].logprobs.append(dict(zip(entry.token_ids, entry.logprobs, strict=True)))
                if stream.finished:
                    del streams[index]
        return answers


def open_engine(
    path: Path,
    *,
    backend: str = "reference",
    dtype: str = "float32",
    block_size: int = 16,
    budget: int = 48,
    max_model_len: int | None = None,
) -> Engine:
    model = ModelConfig(path=str(path), dtype=dtype, device="cpu", kernel_backend=backend, max_model_len=max_model_len)  # type: ignore[arg-type]
    core, ready = build_engine(
        EngineConfig(
            model=model,
            cache=CacheConfig(block_size=block_size, kv_cache_memory=2**24, enable_prefix_caching=True),
            scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget),
        )
    )
    return Engine(core, InlineClient(core, ready), ready.notes)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def assert_answers_equal(family: Family, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> None:
    """Greedy tokens are the oracle's, and their probabilities close to its own."""
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = family.logits([*prompt, *answer.token_ids])[len(prompt) - 1 : -1].log_softmax(-1)
        assert answer.token_ids == expected.argmax(-1).tolist()
        for row, found in zip(expected, answer.logprobs, strict=True):
            ids = list(found)
            torch.testing.assert_close(torch.tensor([found[i] for i in ids]), row[ids], rtol=1e-3, atol=2e-3)
