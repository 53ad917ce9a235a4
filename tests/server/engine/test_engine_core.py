"""The engine step around a scripted runner: failures stay with whoever caused them, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import pytest
from octavo.scheduler.batch import BlockCopy
from octavo.scheduler.sampling_params import InvalidRequest, SamplingParams
from octavo.server.engine.client import EngineState, EngineUnavailable
from octavo.server.engine.core import EngineCore
from octavo.server.engine.execution import EngineFailure
from octavo.server.engine.inline import InlineClient
from octavo.server.engine.messages import GenerateRequest, StepOutput, StepStats, TokenOutput
from octavo.server.engine.wire import ConnectionClosed, FrameBuffer, encode_frame, up_decoder
from scripted_engine import READY, OverlappingRunner, ScriptedRunner, core_of, request


def run(core: EngineCore) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while core.has_work:
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def test_one_poisoned_request_of_sixteen_fails_alone(core: EngineCore, runner: ScriptedRunner) -> None:
    for index in range(16):
        core.add(request(f"r{index}"))
    runner.poisoned.add("r11")
    outputs = run(core)
    for name, items in outputs.items():
        if name == "r11":
            (only,) = items
            assert only.error is not None
            assert only.error.code == "internal_error"
            assert "secret" not in only.error.message
        else:
            assert [token for item in items for token in item.token_ids] == [7, 7, 7]
            assert items[-1].finish_reason == "length"
    # The failed step, once more as a whole, and its halves, down to single rows; then the steps of the fifteen others.
    assert runner.executed == [16, 16, 8, 8, 4, 2, 2, 1, 1, 4, 15, 15]
    core.idle()
    assert sorted(set(runner.released)) == sorted(f"r{index}/0" for index in range(16))
    assert core.scheduler.blocks.num_free_blocks == [256]


def test_all_samples_of_a_failed_request_end_with_one_error(core: EngineCore, runner: ScriptedRunner) -> None:
    core.add(request("many", n=4))
    core.step()
    runner.poisoned.add("many")
    outputs = run(core)["many"]
    assert [output.error is not None for output in outputs] == [True]
    assert not core.scheduler.requests


def test_a_broken_machine_ends_the_engine(core: EngineCore, runner: ScriptedRunner) -> None:
    core.add(request("a"))
    core.add(request("b"))
    runner.broken = True
    with pytest.raises(EngineFailure, match="no device"):
        core.step()


def test_a_full_queue_is_one_error_output(core: EngineCore) -> None:
    for index in range(41):
        core.add(request(f"r{index}"))
    outputs = run(core)
    assert outputs["r40"][0].error is not None
    assert outputs["r40"][0].error.code == "queue_full"
    assert sum(items[-1].finish_reason == "length" for items in outputs.values()) == 40


def test_counters_are_reported_once(core: EngineCore) -> None:
    core.add(request("a"))
    stats = [core.step().stats for _ in range(3)]
    assert [item.num_prompt_tokens for item in stats] == [3, 0, 0]
    assert [item.num_generation_tokens for item in stats] == [1, 1, 1]
    assert stats[-1].num_running == 0
    assert core.idle().stats.num_generation_tokens == 0


def test_the_time_of_a_step_s_emission_comes_with_the_next_message(core: EngineCore) -> None:
    core.add(request("a"))
    assert core.step().stats.emit_seconds == 0
    core.note_emitted(0.25)
    core.note_emitted(0.5)
    assert core.step().stats.emit_seconds == 0.75
    assert core.step().stats.emit_seconds == 0
    core.note_emitted(1.0)
    assert core.idle().stats.emit_seconds == 1.0


def test_the_stats_say_who_waits_for_what_and_what_was_missed(core: EngineCore) -> None:
    for index in range(3):
        prompt = list(range(index, index + 40))
        core.add(GenerateRequest(request_id=str(index), prompt_token_ids=prompt, params=SamplingParams(max_tokens=2)))
    stats = core.step().stats  # a budget of 64 tokens
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_deferred) == (2, 1, 1)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (80, 0)
    assert (stats.prefix_misses_new, stats.prefix_misses_evicted, stats.prefix_misses_tail) == (72, 0, 8)
    stats = core.step().stats
    assert (stats.num_waiting, stats.prefix_cache_queries) == (0, 40)


def test_there_is_time_for_other_things_while_a_step_runs() -> None:
    runner = OverlappingRunner()
    core = core_of(runner)
    core.add(request("a"))
    for _ in range(3):
        core.step(lambda: runner.events.append("meanwhile"))
    assert runner.events == ["launch", "meanwhile", "result"] * 3


def test_a_step_under_way_is_waited_for_when_something_else_fails() -> None:
    runner = OverlappingRunner()
    core = core_of(runner)
    core.add(request("a"))

    def fail() -> None:
        raise ConnectionClosed("the server has gone")

    with pytest.raises(ConnectionClosed):
        core.step(fail)
    assert runner.events == ["launch", "result"]


def test_timings_come_in_order(core: EngineCore) -> None:
    core.add(request("a"))
    timings = run(core)["a"][-1].timings
    assert timings is not None
    assert timings.arrival <= timings.scheduled <= timings.first_token <= timings.last_token


def test_the_inline_client_streams_and_refuses(core: EngineCore) -> None:
    async def scenario() -> None:
        client = InlineClient(core, READY)
        await client.start()
        stream = client.submit(request("a"))
        tokens: list[int] = []
        while not stream.finished:
            tokens += [token for output in await stream.next() for token in output.token_ids]
        assert tokens == [7, 7, 7]
        assert client.num_open_requests == 0
        with pytest.raises(InvalidRequest, match="vocabulary"):
            client.submit(GenerateRequest(request_id="b", prompt_token_ids=[100], params=SamplingParams()))
        with pytest.raises(InvalidRequest) as too_long:
            client.submit(GenerateRequest(request_id="b", prompt_token_ids=[1] * 65, params=SamplingParams()))
        assert too_long.value.code == "context_length_exceeded"
        waiting = client.submit(request("c", max_tokens=60))
        await client.close()
        (last,) = [output for output in await waiting.next() if output.error is not None]
        assert last.error is not None
        assert last.error.code == "engine_dead"
        assert client.state is EngineState.CLOSED
        with pytest.raises(EngineUnavailable):
            client.submit(request("d"))

    asyncio.run(scenario())


def test_the_inline_client_s_listeners_hear_of_the_pool_at_once_and_of_the_end(core: EngineCore) -> None:
    async def scenario() -> None:
        client = InlineClient(core, READY)
        heard: list[StepStats] = []
        client.stats_listeners.append(heard.append)
        await client.start()
        assert [(stats.num_blocks, stats.num_free_blocks) for stats in heard] == [(256, 256)]
        assert client.engine_pid == os.getpid()
        stream = client.submit(request("a"))
        while not stream.finished:
            await stream.next()
        assert sum(stats.num_generation_tokens for stats in heard) == 3
        assert all(stats.emit_seconds == 0 for stats in heard)
        await client.close()
        assert heard[-1] == StepStats()
        assert client.engine_pid is None

    asyncio.run(scenario())


def test_frames_survive_any_cut() -> None:
    messages = [encode_frame(StepOutput(outputs=[TokenOutput(request_id=str(i))], stats=StepStats())) for i in range(5)]
    data = b"".join(messages)
    for size in (1, 2, 3, 7, len(data)):
        buffer = FrameBuffer()
        frames = [f for start in range(0, len(data), size) for f in buffer.feed(data[start : start + size])]
        decoded = [up_decoder.decode(payload) for payload in frames]
        assert [message.outputs[0].request_id for message in decoded if isinstance(message, StepOutput)] == list(
            "01234"
        )


def test_a_copy_that_fails_ends_only_the_request_it_was_for(
    core: EngineCore, runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.add(request("other"))
    core.add(request("samples", n=2))
    core.step()

    def copy_blocks(copies: Sequence[BlockCopy]) -> None:
        if copies:
            raise MemoryError("no room for a copy")

    monkeypatch.setattr(runner, "copy_blocks", copy_blocks)
    outputs = run(core)
    assert outputs["samples"][-1].error is not None
    assert outputs["other"][-1].finish_reason == "length"
    core.idle()
    assert core.scheduler.blocks.num_free_blocks == [256]


def test_what_a_failed_request_computed_is_never_found_again(core: EngineCore, runner: ScriptedRunner) -> None:
    prompt = list(range(1, 20))
    for name in ("first", "second"):
        core.add(GenerateRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=9)))
        core.step()
    assert core.scheduler.counters.prefix_cache_hits == 16
    runner.poisoned.add("second")
    run(core)
    core.add(GenerateRequest(request_id="third", prompt_token_ids=prompt, params=SamplingParams(max_tokens=1)))
    run(core)
    assert core.scheduler.counters.prefix_cache_hits == 16
