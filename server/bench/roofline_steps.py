"""Steps of the model runner, timed: batches built by hand over a pool filled with noise, no scheduler in front."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ...model.config import ModelConfig
from ...model.kv_cache import bytes_per_block
from ...model.memory import free_memory
from ...model.runner import ModelRunner
from ...model.spec import ModelError
from ...scheduler.batch import ScheduledBatch, ScheduledRow
from ...scheduler.sampling_params import SamplingParams
from .ceilings import time_calls
from .roofline import StepShape

_POOL_SHARE = 0.6
"""Of the free memory; the rest is for activations and whatever else runs."""
_WARM_UPS = 2
_NOISE_SCALE = 0.1
_GREEDY = SamplingParams(temperature=0.0)


class StepBench:
    """A loaded model with a pool large enough for the largest of the wanted steps that fit the memory."""

    def __init__(self, config: ModelConfig, block_size: int, shapes: Sequence[StepShape]) -> None:
        """Raises ModelError if the model cannot be loaded, or not one of the steps fits."""
        self.runner = ModelRunner(config, block_size=block_size)
        spec, dtype = self.runner.spec, self.runner.backend.dtype
        self._block_bytes = bytes_per_block(spec, block_size, dtype)
        self.budget_bytes = int(_POOL_SHARE * free_memory(self.runner.backend.device).free_bytes)
        self.fitting = [shape for shape in shapes if self.pool_bytes(shape) <= self.budget_bytes]
        if not self.fitting:
            needed = min(self.pool_bytes(shape) for shape in shapes)
            raise ModelError(
                f"the smallest of these steps needs {needed / 2**30:.2f} GiB of K/V, and "
                f"{self.budget_bytes / 2**30:.2f} GiB can be had; give a smaller --batch or --context, or free memory"
            )
        plan = self.runner.allocate_cache(
            kv_cache_memory=max(self.pool_bytes(shape) for shape in self.fitting),
            max_num_seqs=max(shape.num_rows for shape in self.fitting),
            max_model_len=max(shape.num_context + shape.num_new for shape in self.fitting),
            max_num_batched_tokens=max(shape.num_tokens for shape in self.fitting),
        )
        self._pools = plan.pools
        self._fill_pools()

    def pool_bytes(self, shape: StepShape) -> int:
        """Of the pool that a step needs; block 0 included, and at least as much as the runner accepts."""
        return (max(4, shape.num_rows * self._blocks_per_row(shape)) + 1) * self._block_bytes

    def measure(self, shape: StepShape, repeats: int) -> list[float]:
        """Seconds of each repeat of a whole step of the runner: batch to tensors, forward pass, greedy draw."""
        batch = self._batch(shape)
        seconds = time_calls(lambda: self.runner.execute(batch), self.runner.backend.device, repeats, _WARM_UPS)
        self.runner.release([row.seq_id for row in batch.rows])
        return seconds

    def _batch(self, shape: StepShape) -> ScheduledBatch:
        """Rows own different blocks, scattered as in a pool that has been used: each K/V really is read."""
        rng = random.Random(0)
        shuffled = [rng.sample(range(1, pool.num_blocks), pool.num_blocks - 1) for pool in self._pools]
        num_tokens = shape.num_context + shape.num_new
        rows = [
            ScheduledRow(
                seq_id=f"bench/{index}",
                token_ids=[rng.randrange(self.runner.spec.vocab_size) for _ in range(num_tokens)],
                num_prompt_tokens=num_tokens,
                num_computed_tokens=shape.num_context,
                num_scheduled_tokens=shape.num_new,
                block_ids=tuple(
                    self._table(shape, index, pool.window, ids) for pool, ids in zip(self._pools, shuffled, strict=True)
                ),
                params=_GREEDY,
                seed=0,
            )
            for index in range(shape.num_rows)
        ]
        return ScheduledBatch(rows, num_decode_rows=shape.num_rows if shape.num_new == 1 else 0)

    def _table(self, shape: StepShape, index: int, window: int | None, ids: Sequence[int]) -> list[int]:
        """A row's blocks; block 0 where its window has passed."""
        num_passed = 0 if window is None else max(0, shape.num_context + 1 - window) // self.runner.block_size
        num_held = self._blocks_per_row(shape) - num_passed
        return [0] * num_passed + [ids[place % len(ids)] for place in range(index * num_held, (index + 1) * num_held)]

    def _blocks_per_row(self, shape: StepShape) -> int:
        return -(-(shape.num_context + shape.num_new) // self.runner.block_size)

    def _fill_pools(self) -> None:
        """The same noise in every block. Zeros would cost the same, but an untouched pool is not yet memory at all."""
        for pool in self.runner.kv_pools:  # [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]
            generator = torch.Generator(pool.device).manual_seed(0)
            noise = torch.randn(pool[:, :1].shape, device=pool.device, generator=generator)
            pool.copy_((noise * _NOISE_SCALE).to(pool.dtype).expand_as(pool))
