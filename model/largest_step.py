"""What the largest step allocates: measured by running it, where memory is the device's alone (CUDA).

An estimate must be too high to be safe, and what it is too high by is missing in the pool; a step that was run is
exact. Only torch's own allocator is asked, so what other processes allocate meanwhile is not taken for ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from ..scheduler.batch import ScheduledBatch, ScheduledRow
from ..scheduler.sampling_params import SamplingParams

_BLOCK_ID = 1
"""Every sequence of the step has this block alone in its table, again and again: what it holds does not matter, and so
a pool of two blocks serves sequences of any length."""

_WIDEST = SamplingParams(
    temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, presence_penalty=0.1, repetition_penalty=1.1, logprobs=20
)
"""Asks for everything that drawing a token can allocate."""


class DeviceMemory(Protocol):
    """A device's allocator, as it counts."""

    def settle(self) -> None:
        """Give back what is cached, and count the peak from here."""
        ...

    def reserved_bytes(self) -> int:
        """Taken from the device at this moment."""
        ...

    def peak_bytes(self) -> int:
        """Most that was reserved since `settle`."""
        ...


class CudaMemory:
    """torch's caching allocator. Reserved bytes, not allocated ones: what lies between blocks is gone as well."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def peak_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)


def device_memory(device: torch.device) -> DeviceMemory | None:
    """None where steps share the host's memory with everything else: there an estimate must do."""
    return CudaMemory(device) if device.type == "cuda" else None


def largest_batches(
    *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int, num_groups: int
) -> list[ScheduledBatch]:
    """The steps that need most: as many tokens and draws as a step may have, the longest sequence as long as one may
    be; then two of nothing but decodes, the second of which is where a step is captured."""
    num_rows = min(max_num_seqs, max_num_batched_tokens)
    spare = max_num_batched_tokens - num_rows
    chunks: list[int] = []  # of the last rows, which prefill
    while spare and len(chunks) < num_rows:
        more = min(spare, max_model_len - 1)
        if not more:
            break
        chunks.append(1 + more)
        spare -= more
    num_decodes = num_rows - len(chunks)

    def row(index: int, num_scheduled: int, num_tokens: int) -> ScheduledRow:
        blocks = ([_BLOCK_ID] * -(-num_tokens // block_size),) * num_groups
        return ScheduledRow(
            f"largest/{index}", [0] * num_tokens, 1, num_tokens - num_scheduled, num_scheduled, blocks, _WIDEST, index
        )

    # Buffers are as wide as the longest row wants them; the others need not be long for that.
    decodes = [row(index, 1, max_model_len if index == 0 else 1) for index in range(num_rows)]
    prefills = [row(num_decodes + index, chunk, max_model_len) for index, chunk in enumerate(chunks)]
    mixed = decodes[:num_decodes] + prefills
    return [
        ScheduledBatch(mixed, num_decodes),
        ScheduledBatch(decodes, num_rows),
        ScheduledBatch(decodes, num_rows),
    ]


def measure(
    memory: DeviceMemory,
    batches: Iterable[ScheduledBatch],
    run: Callable[[ScheduledBatch], object],
    clean_up: Callable[[], None],
) -> int:
    """Bytes that running `batches` takes at most beside what is reserved once `clean_up` has been called."""
    memory.settle()
    try:
        for batch in batches:
            run(batch)
        peak = memory.peak_bytes()
    finally:
        clean_up()
    memory.settle()
    return max(0, peak - memory.reserved_bytes())
