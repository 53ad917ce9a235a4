"""Tiny seeded models of transformers as oracle, and what it takes to run the same weights through Octavo."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.model.config import ModelConfig
from octavo.model.memory import CachePlan
from octavo.model.runner import ModelRunner
from octavo.model.spec import ModelError, ModelSpec, RopeSpec
from octavo.scheduler.batch import ScheduledBatch, ScheduledRow
from octavo.scheduler.sampling_params import SamplingParams
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as TransformersLlama

sys.path.append(str(Path(__file__).parent))

GREEDY = SamplingParams(temperature=0.0)


class MemoryWeight:
    """A StoredWeight over a tensor."""

    encoding = "F32"

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    def raw(self) -> torch.Tensor:
        return self._tensor.view(-1, self._tensor.shape[-1]).view(torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self._tensor.to(dtype, copy=True).contiguous()


class MemorySource:
    """A WeightSource over a state dict; counts which tensors were asked for."""

    def __init__(self, spec: ModelSpec, state: dict[str, torch.Tensor]) -> None:
        self.spec = spec
        self.state = state

    def names(self) -> Collection[str]:
        return self.state.keys()

    def weight(self, name: str) -> MemoryWeight:
        if name not in self.state:
            raise ModelError(f"no tensor {name}")
        return MemoryWeight(name, self.state[name])


def rope_spec(config: LlamaConfig) -> RopeSpec:
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    return RopeSpec(
        theta=parameters["rope_theta"],
        rotary_dim=config.head_dim,
        kind=kind,
        factor=parameters.get("factor", 1.0),
        low_freq_factor=parameters.get("low_freq_factor", 1.0),
        high_freq_factor=parameters.get("high_freq_factor", 4.0),
        original_max_position_embeddings=parameters.get("original_max_position_embeddings", 8192),
    )


def model_spec(config: LlamaConfig) -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope=rope_spec(config),
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        eos_token_ids=(2,),
    )


@dataclass
class TinyModel:
    """A transformers model and a runner over the same weights, with a pool whose blocks are handed out at random."""

    oracle: TransformersLlama
    runner: ModelRunner
    plan: CachePlan
    rng: random.Random
    free_blocks: list[int]

    @property
    def block_size(self) -> int:
        return self.runner.block_size

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """transformers' logits at every position. [num_tokens, vocab]"""
        with torch.inference_mode():
            logits: torch.Tensor = self.oracle(torch.tensor([list(token_ids)])).logits[0]
        return logits.float()

    def sequence(self, num_tokens: int, **kwargs: Any) -> LiveSequence:
        tokens = [self.rng.randrange(3, self.oracle.config.vocab_size) for _ in range(num_tokens)]
        return LiveSequence(self, tokens, num_tokens, **kwargs)


@dataclass
class LiveSequence:
    """The scheduler's side of one sequence, in miniature."""

    model: TinyModel
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams = GREEDY
    seed: int = 0
    seq_id: str = ""
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)

    def row(self, num_scheduled: int | None = None) -> ScheduledRow:
        """The next tokens to run: all that are left, or so many of them. Takes blocks as needed."""
        count = len(self.token_ids) - self.num_computed if num_scheduled is None else num_scheduled
        while len(self.block_ids) * self.model.block_size < self.num_computed + count:
            self.block_ids.append(self.model.free_blocks.pop())
        row = ScheduledRow(
            self.seq_id or str(id(self)),
            self.token_ids,
            self.num_prompt_tokens,
            self.num_computed,
            count,
            (self.block_ids,),
            self.params,
            self.seed,
        )
        self.num_computed += count
        return row


def batch_of(decode: Sequence[ScheduledRow] = (), prefill: Sequence[ScheduledRow] = ()) -> ScheduledBatch:
    return ScheduledBatch([*decode, *prefill], len(decode))


@pytest.fixture
def make_batch() -> Callable[..., ScheduledBatch]:
    return batch_of


@pytest.fixture
def llama_config() -> Callable[..., LlamaConfig]:
    def make(**changes: Any) -> LlamaConfig:
        settings: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
        }
        return LlamaConfig(**(settings | changes))

    return make


@pytest.fixture
def make_source(llama_config: Callable[..., LlamaConfig]) -> Callable[..., MemorySource]:
    def make(**changes: Any) -> MemorySource:
        oracle = _oracle(llama_config(**changes))
        return MemorySource(model_spec(oracle.config), oracle.state_dict())

    return make


@pytest.fixture
def memory_source() -> Callable[[ModelSpec, dict[str, torch.Tensor]], MemorySource]:
    return MemorySource


def _oracle(config: LlamaConfig) -> TransformersLlama:
    torch.manual_seed(0)
    oracle = TransformersLlama(config).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return oracle


@pytest.fixture
def tiny_model(llama_config: Callable[..., LlamaConfig]) -> Callable[..., TinyModel]:
    def make(
        *, block_size: int = 16, dtype: str = "float32", num_blocks: int = 160, seed: int = 0, **changes: Any
    ) -> TinyModel:
        oracle = _oracle(llama_config(**changes))
        spec = model_spec(oracle.config)
        source = MemorySource(spec, {name: tensor.clone() for name, tensor in oracle.state_dict().items()})
        config = ModelConfig(path="in memory", dtype=dtype, device="cpu")  # type: ignore[arg-type]
        runner = ModelRunner(config, block_size=block_size, source=source)
        per_block = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * block_size
        plan = runner.allocate_cache(
            kv_cache_memory=num_blocks * per_block * runner.backend.dtype.itemsize,
            max_num_seqs=1000,
            max_model_len=None,
            max_num_batched_tokens=2048,
        )
        rng = random.Random(seed)
        free_blocks = list(range(1, plan.pools[0].num_blocks))
        rng.shuffle(free_blocks)
        return TinyModel(oracle.to(runner.backend.dtype), runner, plan, rng, free_blocks)

    return make


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices this small are not worth waking other threads for, least of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
