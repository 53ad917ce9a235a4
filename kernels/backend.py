"""What a model asks of the machine.

Model files call these operators and never ask which device they run on. A backend is constructed once, when the
runner is, and handed to every layer. Each backend keeps its weights and its attention plan in forms of its own;
both are opaque to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from .weights import StoredWeight


@dataclass(slots=True, frozen=True)
class AttentionSpec:
    """The shape of one attention layer's work."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    """Keys that a query sees at most, itself included; 0: all before it."""
    soft_cap: float = 0.0
    """Scores s become cap * tanh(s / cap); 0: as they are."""


@dataclass(slots=True, frozen=True)
class AttentionInputs:
    """Where every token of a step reads and writes K/V, for one layer group. Rows are ordered decode-first.

    The token axis of a step is ragged: row r owns tokens [query_starts[r], query_starts[r + 1]).
    """

    num_rows: int
    num_decode_rows: int
    """Rows [0, num_decode_rows) have one query each, so decode tokens are tokens [0, num_decode_rows)."""
    max_query_len: int
    """Longest prefill chunk; 0 without prefill rows."""
    query_lens: Sequence[int]
    """Host copy: queries of each row. [num_rows]"""
    context_lens: Sequence[int]
    """Host copy: K/V length of each row, this step's tokens included. [num_rows]"""
    query_starts: torch.Tensor  # int64 [num_rows + 1]
    kv_lens: torch.Tensor  # int64 [num_rows], equals context_lens
    positions: torch.Tensor  # int64 [num_tokens]
    slots: torch.Tensor  # int64 [num_tokens], block id * block_size + offset where each token's K/V goes
    block_tables: torch.Tensor  # int64 [num_rows, max_blocks], padded with block 0, which no sequence owns


@dataclass(slots=True, frozen=True)
class DecodeInputs:
    """As AttentionInputs, for a step of one query per row whose numbers exist on the device only: what a captured step
    reads. A padded row has a length of 0 and a slot of -1; nothing is read or written for it."""

    max_kv_len: int
    """No row's K/V is longer."""
    workspace: Any
    """As `decode_workspace` made it, for at least so many rows and so long a K/V."""
    kv_lens: torch.Tensor  # int32 [num_rows], this step's token included
    positions: torch.Tensor  # int64 [num_rows]
    slots: torch.Tensor  # int64 [num_rows], block id * block_size + offset where each token's K/V goes
    block_tables: torch.Tensor  # int32 [num_rows, max_blocks]


@dataclass(slots=True, frozen=True)
class DrawParameters:
    """What the rows of a batch ask for, on the device. The same in every step of the same rows. [num_rows] each."""

    temperatures: torch.Tensor  # fp32, 0: greedy
    top_ks: torch.Tensor  # int32, 0: all
    top_ps: torch.Tensor  # fp32
    min_ps: torch.Tensor  # fp32
    seeds: torch.Tensor  # int64, the bits of the unsigned seed


Activation = Literal["silu", "gelu_tanh", "gelu"]
"""x * sigmoid(x); GELU by tanh; GELU by erf."""


@dataclass(slots=True, frozen=True)
class QKNorms:
    """RMSNorm of each head of q and of k, before they are rotated. The weights as `pack_vector` made them."""

    q: torch.Tensor  # [head_dim]
    k: torch.Tensor  # [head_dim]
    eps: float


@dataclass(slots=True, frozen=True)
class MoeSpec:
    """How a token chooses among the experts of a layer: softmax over all logits in fp32, then the largest."""

    num_experts: int
    num_experts_per_token: int
    renormalize: bool
    """Whether the chosen weights are divided by their sum."""
    activation: Activation


StepFunction = Callable[[torch.Tensor, tuple[Any, ...], torch.Tensor], torch.Tensor]
"""(token_ids int64 [num_tokens], plans, logits_indices int64 [num_logits]) → logits [num_logits, vocab]: a whole step
of a model, made of a backend's operators. One plan for each group of layers; slots and block tables may differ between
groups, rows, positions and lengths do not."""


@dataclass(slots=True, frozen=True)
class DecodeRows:
    """A step in which each row runs one token and draws the next, in the host's numbers. [num_rows] each; slots, tables
    and their rows once for each group of layers."""

    token_ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[Sequence[int]]
    """block id * block_size + offset where each token's K/V goes."""
    block_tables: Sequence[npt.NDArray[np.int64]]  # [num_tables, max_blocks], contiguous
    table_rows: Sequence[Sequence[int]]
    """Which of the tables is each row's. It covers the row's own token."""


class RecordedSteps(Protocol):
    """Runs a recorded step over any rows; a `StepFunction`. Its results are overwritten by the next step."""

    def __call__(
        self, token_ids: torch.Tensor, plans: tuple[Any, ...], logits_indices: torch.Tensor
    ) -> torch.Tensor: ...

    def start_decode(self, rows: DecodeRows, parameters: DrawParameters) -> None:
        """Run the rows and draw a token for each from its logits as they are, as `DrawingBackend.draw` does. Tables and
        parameters stay as they are until `finish_decode`, and nothing else is run."""
        ...

    def finish_decode(self) -> list[int]:
        """Wait for what was started: the tokens; -1 for a row with a NaN."""
        ...


class KernelBackend(Protocol):
    """Operators of a decoder-only transformer over a paged KV pool.

    `kv_layer` is one layer of the pool: [num_blocks, 2, num_kv_heads, block_size, head_dim].
    """

    name: str
    detail: str
    """What of the machine it uses, for messages: "amx, 2 threads". May be empty."""
    device: torch.device
    dtype: torch.dtype

    def weight_bytes(self, weights: Iterable[tuple[str, tuple[int, ...]]]) -> int:
        """Memory that weights of these encodings and shapes take once packed. The matrix of an expert, which a backend
        may keep in another form than others, has a leading 1."""
        ...

    def pack_linear(self, parts: Sequence[StoredWeight], bias: Sequence[StoredWeight] = ()) -> Any:
        """Prepare matrices that share their input as one operator; outputs are concatenated in order.

        Called once per layer at load; `parts` may be read lazily and released afterwards.
        """
        ...

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        """x [num_tokens, in] → [num_tokens, sum(out)]."""
        ...

    def pack_embedding(self, table: StoredWeight) -> Any:
        """Prepare a [vocab, hidden] table for `embed`, and for `linear` too where the head is tied to it."""
        ...

    def logits(self, x: torch.Tensor, head: Any, *, scale: float = 1.0, soft_cap: float = 0.0) -> torch.Tensor:
        """As `linear`, with the matrix or table that is the model's head: x [n, hidden] → [n, vocab], in the working
        dtype or fp32, whatever rounds less at no cost. The product p becomes s = scale * p and, unless soft_cap is 0,
        soft_cap * tanh(s / soft_cap)."""
        ...

    def embed(self, token_ids: torch.Tensor, table: Any, scale: float = 1.0) -> torch.Tensor:
        """token_ids int64 [num_tokens] → rows of the table times `scale`, [num_tokens, hidden].

        The scale is rounded to the working dtype before the product is, as Gemma was trained with.
        """
        ...

    def pack_vector(self, weight: StoredWeight, offset: float = 0.0) -> torch.Tensor:
        """A norm's weight plus `offset`, on the device, in a dtype the norm computes with. With an offset that is fp32,
        whatever the working dtype: Gemma's 1 + w would lose most of w otherwise."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., hidden], normalised over the last axis with fp32 statistics."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(scale * x + residual), scale * x + residual); both [num_tokens, hidden]. May overwrite its
        inputs."""
        ...

    def norm_parts(self, x: torch.Tensor, weights: Sequence[torch.Tensor], eps: float) -> torch.Tensor:
        """RMSNorm of neighbouring parts of each row, each on its own: the first len(weights[0]) columns, the next
        len(weights[1]), and so on; the columns behind them stay. x [num_tokens, width] → the same, in place or not."""
        ...

    def add(self, x: torch.Tensor, residual: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """scale * x + residual, both [num_tokens, hidden]. May overwrite `residual`."""
        ...

    def select_rows(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Rows `indices`, int64 [n], of x [num_tokens, hidden] → [n, hidden]."""
        ...

    def gated(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """[num_tokens, 2 * n] → activation(first half) * second half, [num_tokens, n]."""
        ...

    def pack_experts(self, gate_up: Sequence[Sequence[StoredWeight]], down: Sequence[StoredWeight]) -> Any:
        """Prepare the experts of a layer for `moe`. gate_up[e]: the parts of expert e's first matrix, together
        [2 * inner, hidden], gate above up; down[e] [hidden, inner]. Released afterwards."""
        ...

    def moe(self, x: torch.Tensor, router_logits: torch.Tensor, experts: Any, spec: MoeSpec) -> torch.Tensor:
        """The weighted sum of what each token's experts make of it: down(gated(gate_up(x))).

        x [num_tokens, hidden], router_logits [num_tokens, num_experts] → [num_tokens, hidden]. A token's result does
        not depend on which others are there, as far as the products it is made of do not.
        """
        ...

    def plan_attention(self, inputs: AttentionInputs, spec: AttentionSpec, block_size: int) -> Any:
        """Whatever every attention layer of this step shares: index tensors, masks, split counts."""
        ...

    def attention_workspace_bytes(
        self, spec: AttentionSpec, block_size: int, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
    ) -> int:
        """An upper estimate of what planning, attending and multiplying allocate beside q, K/V and the outputs, over
        any one step of so many tokens and rows whose longest sequence has `max_model_len`."""
        ...

    def rope_and_write_kv(
        self,
        qkv: torch.Tensor,
        rope_table: torch.Tensor,
        kv_layer: torch.Tensor,
        plan: Any,
        spec: AttentionSpec,
        norms: QKNorms | None = None,
    ) -> torch.Tensor:
        """Norm the heads of q and k where the model does, rotate them (half-split "neox" pairing), write k and v to
        their slots, return q.

        qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; rope_table fp32 [max_positions, rotary_dim],
        cosines in the first half of the last axis and sines in the second. → q [num_tokens, num_heads, head_dim].
        """
        ...

    def attention(self, q: torch.Tensor, kv_layer: torch.Tensor, plan: Any, spec: AttentionSpec) -> torch.Tensor:
        """Causal attention of each query over its row's K/V in the pool, decode rows and prefill rows alike.

        q [num_tokens, num_heads, head_dim] → [num_tokens, num_heads * head_dim].
        """
        ...

    def copy_blocks(self, pool: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
        """pool [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]: targets := sources, all layers."""
        ...


@runtime_checkable
class DrawingBackend(KernelBackend, Protocol):
    """A backend that draws tokens by kernels of its own."""

    def draw(self, logits: torch.Tensor, parameters: DrawParameters, positions: torch.Tensor) -> torch.Tensor:
        """logits [num_rows, vocab] → token ids int64 [num_rows], -1 for a row with a NaN: the tokens that the model
        room's sampler draws. positions int64 [num_rows]: of the token to draw in its sequence."""
        ...


@runtime_checkable
class RecordingBackend(KernelBackend, Protocol):
    """A backend that runs a whole step in one call, once it has been told what a step is."""

    def record(
        self, compute: StepFunction, *, max_num_tokens: int, max_num_logits: int, num_groups: int
    ) -> RecordedSteps | None:
        """Call `compute` once with stand-ins, remember the operators that it calls, and return what runs them for any
        step of up to so many rows and as many plans. None where `compute` does more than call operators of this
        backend, or not the same in every step."""
        ...


@runtime_checkable
class DeviceBackend(DrawingBackend, Protocol):
    """A backend whose decode steps need nothing of the host while they run, so that they can be captured and replayed
    (CUDA graphs), and launched before the step before them has been looked at."""

    def decode_workspace(self, spec: AttentionSpec, block_size: int, max_num_rows: int, max_kv_len: int) -> Any:
        """What captured steps share, allocated once for each group of layers: steps never run side by side."""
        ...

    def plan_decode(self, inputs: DecodeInputs, spec: AttentionSpec, block_size: int) -> Any:
        """As `plan_attention`, from device tensors alone."""
        ...
