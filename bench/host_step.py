"""What a decode step costs the host: everything around the forward pass, measured without one.

    .venv/bin/python bench/host_step.py [--sequences 1 32 256] [--steps 300] [--out bench/results/host_step.json]

The engine is the real one (scheduler, block manager, core, the building of inputs, sampling parameters, messages)
around a model that computes nothing, in both ways that a runner goes: `cpu`, as DirectDecode brings a step to the one
native call that runs and draws it, and `gpu`, as DecodeAhead loads a captured step ahead of the one that is looked at
(on tensors of the CPU). The HTTP process is the real app, called as ASGI, with the default model's tokenizer. Times are
a thread's CPU time, medians over warm steps of sequences of different lengths, so that a few of them take a new block
in every step.

Left out: the forward pass, attention plans and the draw, launching a graph, copies over PCIe and pinning, the socket
between the processes, uvicorn's writing of HTTP, and everything that a request costs once and not in every step.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import uvloop
from octavo.kernels.backend import AttentionSpec
from octavo.kernels.cpu.program import DecodeProgram
from octavo.kernels.select import as_drawing_backend, select_backend
from octavo.model.block_tables import BlockTables
from octavo.model.config import ModelConfig
from octavo.model.decode_ahead import DecodeAhead
from octavo.model.direct_decode import DirectDecode
from octavo.model.drawn import Drawn
from octavo.model.forward_batch import build_forward_batch
from octavo.model.layer_groups import LayerGroup
from octavo.model.sampler import Sampler
from octavo.model.weights.resolve import resolve_model
from octavo.scheduler.batch import BlockCopy, PendingStep, SampledRow, ScheduledBatch, StepResult
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.server.api.chunks import ChatChunks
from octavo.server.api.generate import Generation
from octavo.server.api.protocol import ChatCompletionRequest
from octavo.server.app import create_app
from octavo.server.bench.machine import describe_machine, describe_torch, machine_line
from octavo.server.config import EngineConfig, ServerConfig
from octavo.server.engine.client import EngineClient
from octavo.server.engine.core import EngineCore
from octavo.server.engine.messages import DownMessage, EngineReady, GenerateRequest, StepOutput, StepStats, TokenOutput
from octavo.server.engine.wire import FrameBuffer, encode_frame, up_decoder
from octavo.server.outputs import TextAssembler
from octavo.server.tokenizer import Tokenizer, load_tokenizer

BLOCK_SIZE = 32
VOCAB = 64
EOS = VOCAB
"""Never drawn, but looked for."""
WARM_UP_STEPS = 40
HTTP_SEQUENCES = 32
CPU = torch.device("cpu")
clock = time.thread_time
"""What this thread has computed: on a shared machine, the time of day counts others' work too."""
TEXT = (
    "The people who keep a lighthouse learn to read the weather from small things: the colour of the water at noon, "
    "how high the gulls fly, whether the rope is dry. “It will blow by evening,” she said — and it did. "
)


class Watch:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self._now: dict[str, float] = {}
        self.steps: dict[str, list[float]] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            started = clock()
            try:
                return function(*arguments, **options)
            finally:
                self.add(name, clock() - started)

        return wrapper

    def add(self, name: str, seconds: float) -> None:
        self._now[name] = self._now.get(name, 0.0) + seconds

    def end_step(self, total: float | None = None) -> None:
        """`total`: what the parts do not explain of it becomes a part, "other"."""
        if total is not None:
            self.add("other", total - sum(self._now.values()))
        for name, seconds in self._now.items():
            self.steps.setdefault(name, []).append(seconds)
        self.steps.setdefault("total", []).append(sum(self._now.values()))
        self._now = {}

    def medians_ms(self) -> dict[str, float]:
        return {name: round(statistics.median(values) * 1e3, 4) for name, values in self.steps.items()}


class NoForward:
    """The steps of a CPU, but for what native code does."""

    def __init__(self, max_num_seqs: int) -> None:
        recorder: Any = SimpleNamespace(token_ids=torch.zeros(max_num_seqs), plans=[None], ops=[])
        context: Any = SimpleNamespace(start=lambda ops, step: None, finish=lambda: None)
        program = DecodeProgram(context, recorder, torch.zeros(max_num_seqs, VOCAB))
        self.start_decode, self.finish_decode = program.start, program.finish


class CpuHost:
    """What model/runner.py does around the forward pass on a CPU."""

    runs_ahead = False

    def __init__(self, watch: Watch, max_num_seqs: int) -> None:
        self._tables = [BlockTables()]
        # Draws by native code where it was built, as a server would.
        self._sampler = Sampler(VOCAB, CPU, as_drawing_backend(select_backend("auto", CPU, torch.bfloat16, 64)))
        self._logits = torch.rand(max_num_seqs, VOCAB, generator=torch.Generator().manual_seed(0))
        steps: Any = NoForward(max_num_seqs)
        self._direct = watch.timed("decode", DirectDecode(steps, self._sampler, self._tables, BLOCK_SIZE).launch)
        self._build = watch.timed("build inputs", build_forward_batch)
        self._sample = watch.timed("sampling", self._draw)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None: ...

    def release(self, seq_ids: Sequence[str]) -> None: ...

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        return self._direct(batch) or self._launch(batch)

    @torch.inference_mode()
    def _launch(self, batch: ScheduledBatch) -> PendingStep:
        forward = self._build(batch, BLOCK_SIZE, CPU, self._tables)
        return StepResult(self._sample(forward.drawing_rows))

    def _draw(self, rows: Sequence[Any]) -> list[SampledRow]:
        return self._sampler.sample(self._logits[: len(rows)], rows).rows() if rows else []


class LaunchedStep:
    def __init__(self, rows: Callable[[], list[SampledRow]]) -> None:
        self._rows = rows

    def result(self) -> StepResult:
        return StepResult(self._rows())


class GpuHost:
    """What it does on a GPU whose decode steps are captured; the graph's replay is left out."""

    runs_ahead = True

    def __init__(self, watch: Watch, max_num_seqs: int) -> None:
        model = SimpleNamespace(layer_groups=(LayerGroup(AttentionSpec(1, 1, 1, scale=1.0), (0,)),))
        backend = SimpleNamespace(dtype=torch.float32, decode_workspace=lambda *_: None)
        kv_layers = [torch.zeros(1, 2, 1, BLOCK_SIZE, 1)]
        sampler = Sampler(VOCAB, CPU)
        self._ahead = DecodeAhead(
            model, backend, sampler, kv_layers, max_num_seqs=max_num_seqs, max_model_len=4096, vocab_size=VOCAB
        )  # type: ignore[arg-type]
        self._ahead._graphs.run = lambda shape: None  # type: ignore[method-assign]
        self._tables = [BlockTables()]
        self._watch = watch
        self._launch = watch.timed("build inputs", self._build)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None: ...

    def release(self, seq_ids: Sequence[str]) -> None: ...

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> PendingStep:
        drawn = self._launch(batch)
        return LaunchedStep(self._watch.timed("sampling", lambda: [] if drawn is None else drawn.rows()))

    def _build(self, batch: ScheduledBatch) -> Drawn | None:
        if self._ahead.takes(batch):
            return self._ahead.launch(batch.rows)
        forward = build_forward_batch(batch, BLOCK_SIZE, CPU, self._tables)
        self._ahead.fill_in(forward.token_ids, batch)
        rows = forward.drawing_rows
        if not rows:
            return None
        drawn = Drawn.start([row.seq_id for row in rows], torch.zeros(len(rows), dtype=torch.int64), None)
        self._ahead.keep(drawn)
        return drawn


def measure_engine(host: type[CpuHost] | type[GpuHost], num_sequences: int, num_steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step in which every sequence decodes."""
    watch, rng = Watch(), random.Random(0)
    num_tokens = WARM_UP_STEPS + num_steps + 100
    max_model_len = 600 + num_tokens
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(200, 600))] for _ in range(num_sequences)]
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=num_sequences),
        CacheConfig(block_size=BLOCK_SIZE),
        pools=[PoolConfig(num_sequences * (2 + max_model_len // BLOCK_SIZE) + 1)],
        max_model_len=max_model_len,
        max_num_batched_tokens=8192,
        eos_token_ids=(EOS,),
    )
    core = EngineCore(scheduler, host(watch, num_sequences))
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=num_tokens)
        core.add(GenerateRequest(request_id=f"chatcmpl-{index:032x}", prompt_token_ids=prompt, params=params))
    while scheduler.num_waiting or any(request.num_output_tokens < 2 for request in scheduler.running):
        core.step()
    scheduler.schedule = watch.timed("schedule", scheduler.schedule)  # type: ignore[method-assign]
    scheduler.update = watch.timed("update", scheduler.update)  # type: ignore[method-assign]
    # As the engine process does before it serves.
    gc.collect()
    gc.freeze()
    watch.end_step()
    for step in range(WARM_UP_STEPS + num_steps):
        if step == WARM_UP_STEPS:
            watch.steps.clear()
        started = clock()
        output = core.step()
        stepped = clock()
        encode_frame(output)
        encoded = clock()
        watch.add("encode", encoded - stepped)
        watch.end_step(encoded - started)
        assert len(output.outputs) == num_sequences
    return watch.medians_ms()


class SilentClient(EngineClient):
    """An engine that says what this file hands to `handle`."""

    async def start(self) -> None:
        self.handle(
            EngineReady(
                max_model_len=8192, max_num_seqs=256, max_num_waiting=256, max_num_batched_tokens=8192,
                block_size=BLOCK_SIZE, num_blocks=9000, pool_blocks=[9000], kv_cache_bytes=1,
                weight_bytes=1, vocab_size=50000, eos_token_ids=[0], prefix_caching=True, architecture="", dtype="",
                device="cpu", backend="", phases={},
            )
        )  # fmt: skip

    async def close(self) -> None: ...

    def _send(self, message: DownMessage) -> None: ...


class Caller:
    """A client of the app that reads a stream and throws it away."""

    def __init__(self, arrived: Callable[[], None]) -> None:
        self._arrived = arrived
        body = {"messages": [{"role": "user", "content": "Tell me of lighthouses."}], "stream": True}
        self._request = json.dumps(body).encode()
        self._sent = False

    async def call(self, app: Any) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/chat/completions", "raw_path": b"", "root_path": "", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._sent:
            await asyncio.Event().wait()
        self._sent = True
        return {"type": "http.request", "body": self._request, "more_body": False}

    async def _send(self, message: dict[str, Any]) -> None:
        if message.get("body"):
            self._arrived()


def step_frames(request_ids: Sequence[str], token_ids: Sequence[int], num_steps: int) -> list[bytes]:
    """The engine's messages: one token for each request in each, from different places of the text."""
    stats = StepStats(
        num_running=len(request_ids), num_blocks=9000, num_free_blocks=5000, num_generation_tokens=len(request_ids),
        num_scheduled_tokens=len(request_ids), schedule_seconds=1e-4, forward_seconds=1e-2, sample_seconds=1e-3,
        update_seconds=1e-4, emit_seconds=1e-4,
    )  # fmt: skip
    return [
        encode_frame(
            StepOutput(
                outputs=[
                    TokenOutput(request_id=request_id, token_ids=[token_ids[(7 * index + step) % len(token_ids)]])
                    for index, request_id in enumerate(request_ids)
                ],
                stats=stats,
            )
        )
        for step in range(num_steps)
    ]


async def measure_http(tokenizer: Tokenizer, num_steps: int) -> dict[str, float]:
    """Milliseconds of each part of what the HTTP process does with one step's message."""
    watch, client = Watch(), SilentClient()
    engine = EngineConfig(model=ModelConfig(path="none"))
    app = create_app(client, ServerConfig(engine=engine, served_model_names=("model",)), tokenizer)
    num_arrived, all_arrived = 0, asyncio.Event()

    def arrived() -> None:
        nonlocal num_arrived
        num_arrived += 1
        if num_arrived == HTTP_SEQUENCES:
            all_arrived.set()

    async with app.router.lifespan_context(app):
        tasks = [asyncio.create_task(Caller(arrived).call(app)) for _ in range(HTTP_SEQUENCES)]
        while client.num_open_requests < HTTP_SEQUENCES:  # noqa: ASYNC110 - a benchmark may poll
            await asyncio.sleep(0.01)
        token_ids = [*tokenizer.encode(TEXT, add_special_tokens=False)]
        frames = step_frames([*client._streams], token_ids, WARM_UP_STEPS + num_steps)
        buffer = FrameBuffer()
        for step, data in enumerate(frames):
            if step == WARM_UP_STEPS:
                watch.steps.clear()
            num_arrived = 0
            all_arrived.clear()
            started = clock()
            (payload,) = buffer.feed(data)
            message = up_decoder.decode(payload)
            decoded = clock()
            client.handle(message)
            handled = clock()
            await all_arrived.wait()
            watch.add("decode", decoded - started)
            watch.add("route", handled - decoded)
            watch.add("wake, detokenise, render", clock() - handled)
            watch.end_step()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return watch.medians_ms() | measure_text(tokenizer, frames)


def measure_text(tokenizer: Tokenizer, frames: Sequence[bytes]) -> dict[str, float]:
    """Detokenising and rendering alone: parts of the above, once more without tasks."""
    watch = Watch()
    messages = [up_decoder.decode(payload) for payload in FrameBuffer().feed(b"".join(frames))]
    request = GenerateRequest(request_id="", prompt_token_ids=[1] * 20, params=SamplingParams())
    texts = [TextAssembler(request, tokenizer, lambda _: None) for _ in range(HTTP_SEQUENCES)]
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": ""}]})
    chunks = ChatChunks(Generation("chatcmpl-0", [], 1), body, "model", None, [[]])
    for message in messages:
        assert isinstance(message, StepOutput)
        started = clock()
        deltas = [text.process([output]) for text, output in zip(texts, message.outputs, strict=True)]
        detokenised = clock()
        for parts in deltas:
            "".join([chunks.render(delta) for delta in parts]).encode()
        watch.add("of it detokenise", detokenised - started)
        watch.add("of it render", clock() - detokenised)
        watch.end_step()
    return {name: value for name, value in watch.medians_ms().items() if name != "total"}


def addition_ns() -> float:
    """What one turn of a loop that adds takes here and now: others on the machine slow everything by a factor."""
    started, total = clock(), 0
    for number in range(200_000):
        total += number
    return round((clock() - started) / 200_000 * 1e9, 1)


def print_table(title: str, columns: dict[str, dict[str, float]]) -> None:
    """Rows are parts, columns are cases; the total last."""
    parts = list(dict.fromkeys(name for column in columns.values() for name in column if name != "total"))
    width = max(map(len, [*parts, title]))
    print(f"\n{title:{width}}" + "".join(f"{name:>12}" for name in columns))
    for part in [*parts, "total"]:
        print(f"{part:{width}}" + "".join(f"{column.get(part, 0.0):12.3f}" for column in columns.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "host_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine, setup = describe_machine(), describe_torch("cpu")
    print(machine_line(machine, setup))
    additions = [addition_ns()]
    engine = {
        f"{name} {count}": measure_engine(host, count, options.steps)
        for name, host in (("cpu", CpuHost), ("gpu", GpuHost))
        for count in options.sequences
    }
    print_table("engine process, ms per step", engine)
    http = uvloop.run(measure_http(load_tokenizer(resolve_model(None)), options.steps))
    print_table("HTTP process, ms per step", {f"{HTTP_SEQUENCES}": http})
    additions.append(addition_ns())
    print(f"\none addition in Python: {additions[0]} ns before, {additions[1]} ns after")
    results = {
        "command": f"bench/host_step.py --sequences {' '.join(map(str, options.sequences))} --steps {options.steps}",
        "machine": dataclasses.asdict(machine) | dataclasses.asdict(setup),
        "python_addition_ns": additions,
        "engine_ms_per_step": engine,
        "http_ms_per_step": {f"{HTTP_SEQUENCES}": http},
    }
    options.out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
