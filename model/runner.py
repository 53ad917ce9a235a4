"""Runs scheduled batches through a model: loads it, owns the K/V pool, forwards, samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kernels.backend import RecordingBackend, StepFunction
from ..kernels.select import (
    as_device_backend,
    as_drawing_backend,
    as_recording_backend,
    fallback_note,
    label,
    select_backend,
)
from ..scheduler.batch import BlockCopy, PendingStep, ScheduledBatch, StepResult
from .block_tables import BlockTables
from .config import ModelConfig
from .decode_ahead import DecodeAhead
from .device import resolve_device, resolve_dtype
from .direct_decode import DirectDecode
from .drawn import Drawn
from .forward_batch import ForwardBatch, build_forward_batch
from .kv_cache import allocate_pools, layers_of
from .kv_layout import kv_layout
from .largest_step import DeviceMemory, device_memory, largest_batches, measure
from .loader import check_weights, dequantized_note, load_model, stored_weights
from .memory import (
    DEFAULT_BATCHED_TOKENS,
    CachePlan,
    CacheRequest,
    PoolPlan,
    cache_request,
    is_out_of_memory,
    longest_possible,
    plan_cache,
)
from .registry import PositionedCausalLM, family_note
from .sampler import Sampler
from .spec import ModelError
from .weights.open import open_weights
from .weights.source import WeightSource

_SMALLER_WEIGHTS = "free some memory, or choose a smaller model, dtype bfloat16 or another device"


@contextmanager
def _needing_memory(what: str, mend: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(f"there is not enough memory for {what}; {mend}") from error


class ModelRunner:
    """One model on one device. It reads scheduled rows and never changes them, nor keeps them beyond a step.

    Executing a batch, or a part of it, once more writes the same keys and values to the same places and counts
    nothing twice, so a failed step may be retried.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        block_size: int,
        progress: Callable[[str, float], None] | None = None,
        source: WeightSource | None = None,
    ) -> None:
        """Load the model; `progress` gets a phase's name and the share of it done. `source` replaces the one that
        `config.path` names. Raises ModelError if the model or the device cannot be used as asked."""
        self.notes: list[str] = []
        """One line each: what is not as it might be, and why."""
        self.phases: dict[str, float] = {}
        """Seconds spent in each phase of the start."""
        report = progress or (lambda phase, share: None)
        self.block_size = block_size
        self._device = resolve_device(config.device)
        with self._phase("open", report):
            source = source or open_weights(config.path, config.load_format, config.model_impl)
            num_parameters = check_weights(source)
        self.spec = source.spec
        family = family_note(self.spec)
        if family is not None:
            self.notes.append(family)
        dtype = resolve_dtype(config.dtype, self._device, config.kernel_backend, self.spec)
        with self._phase("load", report), torch.inference_mode():
            try:
                self.backend = select_backend(config.kernel_backend, self._device, dtype, self.spec.head_dim)
            except ValueError as error:
                raise ModelError(str(error)) from error
            note = fallback_note(config.kernel_backend, self._device, dtype, self.spec.head_dim)
            if note is not None:
                self.notes.append(note)
            self.weights = stored_weights(source)
            """Encoding and shape of each, in the order in which the family lists them."""
            self.weight_bytes = (
                self.backend.weight_bytes(self.weights) if family is None else num_parameters * dtype.itemsize
            )
            """As the backend keeps them."""
            note = dequantized_note(self.weights, self.backend if family is None else None, dtype)
            if note is not None:
                self.notes.append(note)
            with _needing_memory(f"the weights ({self.weight_bytes / 2**30:.2f} GiB)", _SMALLER_WEIGHTS):
                self._model = load_model(source, self.backend, lambda share: report("load", share))
                self._sampler = Sampler(self.spec.vocab_size, self._device, as_drawing_backend(self.backend))
        self._positioned = self._model if isinstance(self._model, PositionedCausalLM) else None
        """The model, if its steps are more than the backend's operators: it must be told where their tokens stand, and
        it can neither be recorded nor captured."""
        self._block_tables = [BlockTables(group) for group in range(len(self._model.layer_groups))]
        self._kv_pools: tuple[torch.Tensor, ...] = ()
        self._kv_layers: list[torch.Tensor] = []
        self._step: StepFunction = self._compute
        self._decode: DecodeAhead | None = None
        self._direct: DirectDecode | None = None

    @contextmanager
    def _phase(self, name: str, report: Callable[[str, float], None]) -> Iterator[None]:
        report(name, 0.0)
        started = time.perf_counter()
        yield
        self.phases[name] = time.perf_counter() - started
        report(name, 1.0)

    @property
    def backend_label(self) -> str:
        """Which kernels serve, for messages."""
        return label(self.backend)

    @property
    def default_max_num_batched_tokens(self) -> int:
        return DEFAULT_BATCHED_TOKENS[self._device.type]

    def allocate_cache(
        self,
        *,
        kv_cache_memory: int | None,
        max_num_seqs: int,
        max_model_len: int | None,
        max_num_batched_tokens: int,
    ) -> CachePlan:
        """Size and allocate the pool, once, before the first batch. Raises ModelError if too little memory is left."""
        started = time.perf_counter()
        request = cache_request(
            self.spec,
            self.backend,
            block_size=self.block_size,
            kv_cache_memory=kv_cache_memory,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        memory = device_memory(self._device)
        if memory is not None and kv_cache_memory is None:
            request = replace(request, step_bytes=self._measure_step(memory, request))
        plan = plan_cache(self.spec, request, self._device)
        self._set_up(plan, request)
        recording_backend = as_recording_backend(self.backend) if self._positioned is None else None
        if recording_backend is not None:
            self._record(recording_backend, max_num_seqs, max_num_batched_tokens)
        self.phases["allocate_cache"] = time.perf_counter() - started
        return plan

    def _set_up(self, plan: CachePlan, request: CacheRequest) -> None:
        """Allocate the pools and what goes with them."""
        what = f"the KV cache ({plan.kv_cache_bytes / 2**30:.2f} GiB)"
        with _needing_memory(what, "give a smaller kv-cache-memory, or free some memory"):
            self._kv_pools = allocate_pools(self.spec, plan, self.block_size, self.backend.dtype, self._device)
            self._kv_layers = layers_of(self.spec, self._kv_pools)
        what = f"the rotations of {plan.max_model_len} positions"
        with _needing_memory(what, "give a smaller max-model-len or kv-cache-memory"):
            self._model.prepare(plan.max_model_len)
        device_backend = as_device_backend(self.backend) if self._positioned is None else None
        if device_backend is not None:
            self._decode = DecodeAhead(
                self._model,
                device_backend,
                self._sampler,
                self._kv_layers,
                max_num_seqs=request.max_num_seqs,
                max_model_len=plan.max_model_len,
                vocab_size=self.spec.vocab_size,
            )

    def _measure_step(self, memory: DeviceMemory, request: CacheRequest) -> int:
        """Bytes that the largest step takes, with pools of two blocks in the place of the real ones."""
        longest = longest_possible(self.spec, request, self._device)
        windows = [group.layer.window for group in kv_layout(self.spec).groups]
        plan = CachePlan(tuple(PoolPlan(2, window) for window in windows), longest, 0)
        batches = largest_batches(
            max_num_seqs=request.max_num_seqs,
            max_num_batched_tokens=request.max_num_batched_tokens,
            max_model_len=longest,
            block_size=self.block_size,
            num_groups=self.num_groups,
        )

        def run(batch: ScheduledBatch) -> None:
            if not self._kv_pools:
                self._set_up(plan, request)
            self.launch(batch).result()

        def clean_up() -> None:
            self.release([row.seq_id for batch in batches for row in batch.rows])
            self._kv_pools, self._kv_layers, self._decode = (), [], None

        what = f"a step of {request.max_num_batched_tokens} tokens and {request.max_num_seqs} sequences"
        with _needing_memory(what, "give a smaller max-num-batched-tokens, max-num-seqs or max-model-len"):
            return measure(memory, batches, run, clean_up)

    @property
    def num_groups(self) -> int:
        """Layer groups: a row of a batch brings a block table for each."""
        return len(self._model.layer_groups)

    @property
    def kv_pools(self) -> tuple[torch.Tensor, ...]:
        """For each layer group [layers of the group, num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        self._require_cache()
        return self._kv_pools

    @property
    def kv_layers(self) -> list[torch.Tensor]:
        """Each layer's part of its pool, [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        self._require_cache()
        return self._kv_layers

    def _require_cache(self) -> None:
        if not self._kv_pools:
            raise RuntimeError("allocate_cache must be called before the first batch")

    @torch.inference_mode()
    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks in all layers. `execute` does not look at `batch.block_copies`: copy before it, and once."""
        for group in {copy.group for copy in copies}:
            pairs = [(copy.source, copy.target) for copy in copies if copy.group == group]
            sources, targets = zip(*pairs, strict=True)
            self.backend.copy_blocks(self.kv_pools[group], sources, targets)

    def release(self, seq_ids: Sequence[str]) -> None:
        """Forget what is kept for sequences that ended; steps leave `finished_seq_ids` to their caller."""
        self._sampler.drop(seq_ids)
        for tables in self._block_tables:
            tables.drop(seq_ids)
        if self._decode is not None:
            self._decode.release(seq_ids)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the one before it has ended."""
        return self._decode is not None

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Launch a step and wait for it. Raises FloatingPointError if a row's logits are NaN."""
        return self.launch(batch).result()

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """One forward pass over all scheduled tokens of all rows, then a token for each row that draws.

        Returns when the work is queued. On a CPU other threads may have begun with it; this one works where the result
        is asked for, so that there is time before for what must not wait.
        """
        running = self._direct.launch(batch) if self._direct is not None else None
        if running is not None:
            return running
        if self.runs_ahead or self._device.type != "cpu":
            return self._launch_any(batch)
        return ComingStep(lambda: self._launch_any(batch))

    @torch.inference_mode()
    def _launch_any(self, batch: ScheduledBatch) -> PendingStep:
        started = time.perf_counter()
        drawn = self._launch(batch) if batch.rows else None
        queued = None
        if self._device.type == "cuda":
            queued = torch.cuda.Event()  # type: ignore[no-untyped-call]
            queued.record()
        return RunningStep(drawn, queued, time.perf_counter() - started)

    def _launch(self, batch: ScheduledBatch) -> Drawn | None:
        if self._decode is not None and self._decode.takes(batch):
            return self._decode.launch(batch.rows)
        forward = build_forward_batch(batch, self.block_size, self._device, self._block_tables)
        if self._decode is not None:
            self._decode.fill_in(forward.token_ids, batch)
        logits = self._forward(forward)
        if not forward.drawing_rows:
            return None
        drawn = self._sampler.sample(logits, forward.drawing_rows)
        if self._decode is not None:
            self._decode.keep(drawn)
        return drawn

    @torch.inference_mode()
    def forward_logits(self, batch: ScheduledBatch) -> torch.Tensor:
        """Logits [num_drawing, vocab] of the rows that draw, before any processing."""
        # A recorded step's next run writes where this one has.
        return self._forward(build_forward_batch(batch, self.block_size, self._device, self._block_tables)).clone()

    def _forward(self, batch: ForwardBatch) -> torch.Tensor:
        plans = tuple(
            self.backend.plan_attention(inputs, group.attention, self.block_size)
            for inputs, group in zip(batch.attention, self._model.layer_groups, strict=True)
        )
        if self._positioned is not None:
            self._positioned.place(batch.attention[0].positions)
        return self._step(batch.token_ids, plans, batch.logits_indices)

    def _compute(self, token_ids: torch.Tensor, plans: tuple[Any, ...], logits_indices: torch.Tensor) -> torch.Tensor:
        """One step; a `StepFunction`."""
        hidden = self._model.forward(token_ids, plans, self.kv_layers)  # [num_tokens, hidden]
        if not logits_indices.numel():
            return hidden.new_empty((0, self.spec.vocab_size))
        return self._model.logits(self.backend.select_rows(hidden, logits_indices))

    @torch.inference_mode()
    def _record(self, backend: RecordingBackend, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        # One more than sequences: the probe after a failure brings one of its own.
        max_num_logits = min(max_num_seqs, max_num_batched_tokens) + 1
        step = backend.record(
            self._compute,
            max_num_tokens=max_num_batched_tokens,
            max_num_logits=max_num_logits,
            num_groups=self.num_groups,
        )
        if step is None:
            self.notes.append("steps run operator by operator: this model's cannot be recorded")
        else:
            self._step = step
            self._direct = DirectDecode(step, self._sampler, self._block_tables, self.block_size)


@dataclass(slots=True)
class ComingStep:
    """A step that runs when its result is asked for; a `PendingStep`."""

    _launch: Callable[[], PendingStep]

    def result(self) -> StepResult:
        return self._launch().result()


@dataclass(slots=True)
class RunningStep:
    """A launched step; a `PendingStep`."""

    _drawn: Drawn | None
    _queued: torch.cuda.Event | None
    """Behind the step's work; a step that draws nothing is waited for too, or prompts would pile up on the device."""
    _launch_seconds: float

    def result(self) -> StepResult:
        """Wait for it. Times are the host's: on a device that works asynchronously, the wait for the forward pass
        counts as sampling."""
        started = time.perf_counter()
        if self._queued is not None:
            self._queued.synchronize()
        sampled = [] if self._drawn is None else self._drawn.rows()
        return StepResult(sampled, self._launch_seconds, time.perf_counter() - started)
