"""The same attention by others, for bench/gpu.py: FlashInfer's decode; torch's varlen_attn and SDPA for prefill."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from gpu_measure import Setting, relative_error
from gpu_paged import Paged

_FLASHINFER_WORKSPACE_BYTES = 128 * 2**20
_MAX_DENSE_BYTES = 4 * 2**30
"""Of keys and values that are laid out densely for torch."""


class Rival(Protocol):
    def run(self) -> torch.Tensor: ...

    def error(self, paged: Paged) -> float:
        """The relative difference from what lies in `paged.out`."""
        ...


class FlashInferDecode:
    """BatchDecodeWithPagedKVCacheWrapper (Ye et al. 2025) over the very pool: its HND layout is ours."""

    _workspace: torch.Tensor | None = None
    """Shared: launches follow each other."""

    @staticmethod
    def is_here(setting: Setting) -> bool:
        return setting.device.type == "cuda" and importlib.util.find_spec("flashinfer") is not None

    def __init__(self, paged: Paged) -> None:
        import flashinfer  # type: ignore[import-not-found]

        spec, device, block_size = paged.spec, paged.q.device, paged.layer.shape[3]
        if FlashInferDecode._workspace is None:
            FlashInferDecode._workspace = torch.empty(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        counts = [-(-context // block_size) for context in paged.context_lens]
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
        indices = torch.cat([paged.block_tables[row, :count] for row, count in enumerate(counts)])
        last = torch.tensor([(context - 1) % block_size + 1 for context in paged.context_lens], dtype=torch.int32)
        group = spec.num_heads // spec.num_kv_heads
        self._wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            FlashInferDecode._workspace, "HND", use_tensor_cores=group >= 4
        )
        self._wrapper.plan(
            starts,
            indices,
            last.to(device),
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            block_size,
            window_left=spec.window - 1 if spec.window else -1,
            logits_soft_cap=spec.soft_cap or None,
            q_data_type=paged.q.dtype,
            kv_data_type=paged.layer.dtype,
            sm_scale=spec.scale,
        )
        self._q, self._layer = paged.q.contiguous(), paged.layer

    def run(self) -> torch.Tensor:
        out: torch.Tensor = self._wrapper.run(self._q, self._layer)
        return out

    def error(self, paged: Paged) -> float:
        return relative_error(self.run().flatten(1), paged.out)


class _Varlen:
    """torch.nn.attention.varlen: FlashAttention-2 (or what torch has registered instead) over packed sequences."""

    def __init__(self, paged: Paged, attend: Callable[..., Any]) -> None:
        device, spec = paged.q.device, paged.spec
        self._q = paged.q.contiguous()
        dense = [paged.keys_and_values(row) for row in range(len(paged.context_lens))]
        self._k, self._v = (torch.cat([pair[i].transpose(0, 1) for pair in dense]).contiguous() for i in (0, 1))
        ends = torch.tensor(list(paged.context_lens)).cumsum(0).tolist()
        self._starts_q = paged.query_starts
        self._starts_k = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        self._longest = max(paged.query_lens), max(paged.context_lens)
        self._attend = attend
        known = inspect.signature(attend).parameters
        self._options: dict[str, Any] = {"scale": spec.scale}
        if "window_size" in known:
            self._options["window_size"] = (spec.window - 1 if spec.window else -1, 0)
        elif spec.window == 0:
            self._options["is_causal"] = True
        else:
            raise NotImplementedError("this torch's varlen_attn has no windows")
        group = spec.num_heads // spec.num_kv_heads
        if "enable_gqa" in known:
            self._options["enable_gqa"] = group > 1
        elif group > 1:
            self._k, self._v = (x.repeat_interleave(group, dim=1) for x in (self._k, self._v))
        if "scale" not in known:
            del self._options["scale"]  # every shape here has the default one

    def run(self) -> torch.Tensor:
        packed = (self._q, self._k, self._v, self._starts_q, self._starts_k)
        out: torch.Tensor = self._attend(*packed, *self._longest, **self._options)
        return out

    def error(self, paged: Paged) -> float:
        return relative_error(self.run().flatten(1), paged.out)


class _Sdpa:
    """F.scaled_dot_product_attention, one call per sequence; or one for all where they are alike and begin at 0."""

    def __init__(self, paged: Paged) -> None:
        spec = paged.spec
        rows = range(len(paged.query_lens))
        alike = len({*zip(paged.query_lens, paged.context_lens, strict=True)}) == 1
        dense = [paged.keys_and_values(row) for row in rows]
        queries = [
            paged.q[paged.starts[row] : paged.starts[row + 1]].transpose(0, 1) for row in rows
        ]  # each [num_heads, Q, head_dim]
        whole = [
            (q.contiguous(), k.contiguous(), v.contiguous(), _mask(paged, row))
            for row, (q, (k, v)) in enumerate(zip(queries, dense, strict=True))
        ]
        self._calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]
        if alike and whole[0][3] is None:
            q, k, v = (torch.stack([parts[i] for parts in whole]) for i in range(3))  # type: ignore[misc]
            self._calls = [(q, k, v, None)]
        else:
            self._calls = [(q[None], k[None], v[None], mask) for q, k, v, mask in whole]
        self._options: dict[str, Any] = {"scale": spec.scale, "enable_gqa": spec.num_heads != spec.num_kv_heads}

    def run(self) -> torch.Tensor:
        """Of the last call alone: the others' outputs are dropped, as each timing needs only their work."""
        for q, k, v, mask in self._calls:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **self._options)
        return out

    def error(self, paged: Paged) -> float:
        out = self.run()  # [B or 1, num_heads, Q, head_dim]
        last = out[-1].transpose(0, 1).flatten(1)
        return relative_error(last, paged.out[paged.starts[-2] :])


def _mask(paged: Paged, row: int) -> torch.Tensor | None:
    """None where plain causal attention from the first token on is what is wanted."""
    queries, context = paged.query_lens[row], paged.context_lens[row]
    if queries == context and not (paged.spec.window and context > paged.spec.window):
        return None
    device = paged.q.device
    positions = torch.arange(context - queries, context, device=device)[:, None]
    keys = torch.arange(context, device=device)
    seen = keys <= positions
    return seen & (keys > positions - paged.spec.window) if paged.spec.window else seen


def _varlen(paged: Paged) -> Rival | None:
    """None where torch has none for this device, or for a soft cap."""
    if paged.q.device.type != "cuda" or paged.spec.soft_cap or paged.q.dtype is torch.float32:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return _Varlen(paged, varlen_attn) if _is_small(paged) else None


def _sdpa(paged: Paged) -> Rival | None:
    return None if paged.spec.soft_cap or not _is_small(paged) else _Sdpa(paged)


def _is_small(paged: Paged) -> bool:
    group = paged.spec.num_heads // paged.spec.num_kv_heads
    kv_bytes = sum(paged.context_lens) * 2 * paged.spec.num_kv_heads * paged.spec.head_dim * paged.q.element_size()
    return kv_bytes * group <= _MAX_DENSE_BYTES


TORCH_PREFILL: dict[str, Callable[[Paged], Rival | None]] = {"varlen_attn": _varlen, "SDPA": _sdpa}
