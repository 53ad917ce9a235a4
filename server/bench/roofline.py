"""What a step must at least cost: bytes and FLOPs from the model's shape, against the machine's ceilings. Plain Python,
but for the list of parameters, which the model's family knows.

After Williams, Waterman and Patterson, "Roofline" (2009): a step can be no faster than its bytes take to read and its
operations take to execute, whichever is longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ...model.kv_layout import kv_layout
from ...model.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """A model's sizes, as far as a step's cost depends on them."""

    layer_matmul_parameters: int
    """Every token is multiplied by them."""
    head_parameters: int
    """Only tokens whose logits are wanted are multiplied by them."""
    vector_parameters: int
    """Norms and biases: read, and too few to count as work."""
    weight_bytes: int
    """Read once per step, as the backend keeps them. The input embedding is not among them, unless it is the head."""
    kv_bytes_per_token: int
    """K and V of all layers."""
    embedding_row_bytes: int
    attention_flops_per_pair: int
    """For one query and one key it may see: a product with K and one with V, all heads and layers."""


def model_cost(spec: ModelSpec, parameters: Iterable[tuple[str, tuple[int, ...], int]], itemsize: int) -> ModelCost:
    """`parameters`: name, shape and bytes in memory of each that the family lists; `itemsize`: bytes of the working
    dtype, in which K/V are kept."""
    matrices = vectors = head = weight_bytes = 0
    for name, shape, num_bytes in parameters:
        weight_bytes += num_bytes if name != EMBEDDING or spec.tie_word_embeddings else 0
        if name == EMBEDDING:
            head += math.prod(shape) if spec.tie_word_embeddings else 0
        elif name == HEAD:
            head += math.prod(shape)
        elif len(shape) == 2:
            matrices += math.prod(shape)
        else:
            vectors += math.prod(shape)
    return ModelCost(
        layer_matmul_parameters=matrices,
        head_parameters=head,
        vector_parameters=vectors,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_layout(spec).block_bytes(1, itemsize),
        embedding_row_bytes=spec.hidden_size * itemsize,
        attention_flops_per_pair=4 * spec.num_attention_heads * spec.head_dim * spec.num_hidden_layers,
    )


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step of equal rows, each of which draws a token."""

    num_rows: int
    num_context: int
    """Tokens of each row whose K/V are in the pool already."""
    num_new: int
    """Tokens that each row runs: 1 is a decode."""

    @property
    def kind(self) -> Literal["decode", "prefill"]:
        return "decode" if self.num_new == 1 else "prefill"

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.num_new

    @property
    def num_pairs(self) -> int:
        """Of a query and a key it may see: token i of a chunk sees the context, the chunk before it, and itself."""
        return self.num_rows * (self.num_new * self.num_context + self.num_new * (self.num_new + 1) // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Bytes that must cross the memory bus, and operations. Activations are left out: they fit the caches."""

    weight_bytes: int
    embedding_bytes: int
    kv_read_bytes: int
    kv_written_bytes: int
    flops: int

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.embedding_bytes + self.kv_read_bytes + self.kv_written_bytes


def step_cost(model: ModelCost, shape: StepShape) -> StepCost:
    """Each row's context is read once, however many queries look at it; what a step writes it finds in the caches."""
    matmul = shape.num_tokens * model.layer_matmul_parameters + shape.num_rows * model.head_parameters
    return StepCost(
        weight_bytes=model.weight_bytes,
        embedding_bytes=shape.num_tokens * model.embedding_row_bytes,
        kv_read_bytes=shape.num_rows * shape.num_context * model.kv_bytes_per_token,
        kv_written_bytes=shape.num_tokens * model.kv_bytes_per_token,
        flops=2 * matmul + shape.num_pairs * model.attention_flops_per_pair,
    )


@dataclass(frozen=True, slots=True)
class Floor:
    """The shortest time that the machine allows."""

    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def bound(self) -> Literal["memory", "compute"]:
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"


def floor(cost: StepCost, bytes_per_second: float, flops_per_second: float) -> Floor:
    return Floor(cost.num_bytes / bytes_per_second, cost.flops / flops_per_second)
