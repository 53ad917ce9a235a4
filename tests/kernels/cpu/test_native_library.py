"""The library as such: finding it, refusals, threads that sleep, several callers, forks."""

from __future__ import annotations

import concurrent.futures
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from octavo.kernels.cpu import library
from octavo.kernels.cpu.library import NativeContext, Op, OpKind, Step, supported_isas
from octavo.kernels.cpu.packing import PackedMatrix, pack_matrix

pytestmark = pytest.mark.skipif(not supported_isas(), reason="no native library for this machine")


class Ones:
    """A StoredWeight of ones."""

    name, encoding, shape = "ones", "F32", (64, 48)

    def raw(self) -> torch.Tensor:
        return torch.ones(self.shape).view(torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(self.shape, dtype=dtype)


class Sums:
    """A list of products whose results are known: row r of every one is 48 times r."""

    def __init__(self, context: NativeContext, num_ops: int, num_rows: int = 3) -> None:
        self.matrix: PackedMatrix = pack_matrix([Ones()], context)
        self.x = torch.arange(num_rows).unsqueeze(1).expand(-1, 48).contiguous().to(context.dtype)
        self.out = torch.zeros(num_ops, num_rows, 64, dtype=context.dtype)
        self.ops = [
            Op(kind=OpKind.LINEAR, a=self.x.data_ptr(), out=out.data_ptr(), weight=self.matrix.pointer)
            for out in self.out
        ]
        for op in self.ops:
            op.stride_a, op.stride_out = 48, 64
        self.array = (Op * num_ops)(*self.ops)
        self.step = Step(num_tokens=num_rows)

    def check(self, context: NativeContext, *, in_parts: bool = False) -> None:
        self.out.zero_()
        if in_parts:
            context.start(self.array, self.step)
            context.finish()
        else:
            context.run(self.ops, self.step)
        self.expect(context)

    def expect(self, context: NativeContext) -> None:
        expected = 48 * torch.arange(self.x.shape[0]).view(1, -1, 1).expand_as(self.out)
        assert torch.equal(self.out, expected.to(context.dtype))


def test_the_highest_instruction_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAVO_CPU_ISA", raising=False)
    with NativeContext(torch.bfloat16, 1) as context:
        assert context.info().isa.decode() == supported_isas()[-1]
    monkeypatch.setenv("OCTAVO_CPU_ISA", supported_isas()[0])
    with NativeContext(torch.float32, 2) as context:
        info = context.info()
        assert (info.isa.decode(), info.num_threads, info.type) == (supported_isas()[0], 2, 0)


def test_refusals() -> None:
    with pytest.raises(RuntimeError, match="instruction set"):
        NativeContext(torch.bfloat16, 1, "sse9")
    with pytest.raises(RuntimeError, match="argument"):
        NativeContext(torch.bfloat16, 0)
    with pytest.raises(ValueError, match="float16"):
        NativeContext(torch.float16, 1)
    with NativeContext(torch.bfloat16, 1) as context, pytest.raises(RuntimeError, match="operator"):
        context.run([Op(kind=99)], Step())
    with pytest.raises(RuntimeError, match="closed"):
        context.run([], Step())


def test_without_a_build_there_are_no_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load_library", lambda: None)
    assert library.supported_isas() == ()
    with pytest.raises(RuntimeError, match="not built"):
        NativeContext(torch.bfloat16, 1)


def thread_ids() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def wait_until_asleep(threads: set[str]) -> None:
    """Returns once none of them is running or ready to run (the state behind the name in proc_pid_stat(5))."""
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/self/task/{i}/stat").read_text().rpartition(")")[2].split()[0] != "S" for i in threads):
        assert time.monotonic() < deadline, "threads without work keep running"
        time.sleep(0)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_long_lists_on_any_number_of_threads(num_threads: int) -> None:
    others = thread_ids()
    with NativeContext(torch.bfloat16, num_threads) as context:
        team = thread_ids() - others
        assert len(team) == num_threads - 1
        sums = Sums(context, 200)
        for _ in range(5):
            sums.check(context)
        wait_until_asleep(team)
        sums.check(context)


def test_an_empty_list_is_fine() -> None:
    with NativeContext(torch.float32, 2) as context:
        context.run([], Step(num_tokens=1))


def test_the_others_need_not_wait_for_the_caller() -> None:
    with NativeContext(torch.bfloat16, 2) as context:
        sums = Sums(context, 20)
        context.start(sums.array, sums.step)
        deadline = time.monotonic() + 60
        while not sums.out[-1, -1, -1]:
            assert time.monotonic() < deadline, "nobody works"
            time.sleep(0)
        context.finish()
        sums.expect(context)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_what_was_started_must_be_finished(num_threads: int) -> None:
    with NativeContext(torch.bfloat16, num_threads) as context:
        sums = Sums(context, 20)
        with pytest.raises(RuntimeError, match="started nothing"):
            context.finish()
        with pytest.raises(RuntimeError, match="operator"):
            context.start((Op * 1)(Op(kind=99)), Step())
        context.start(sums.array, sums.step)
        context.finish()
        sums.expect(context)
        for _ in range(2):  # as if the first caller had been interrupted
            sums.out.zero_()
            context.start(sums.array, sums.step)
            sums.check(context)
            context.start(sums.array, sums.step)
            context.settle()
            sums.expect(context)
        sums.out.zero_()
        context.start(sums.array, sums.step)
        context.close()
        sums.expect(context)


def test_callers_at_the_same_time_take_turns() -> None:
    with NativeContext(torch.bfloat16, 2) as context:
        work = [Sums(context, 20, num_rows) for num_rows in (1, 2, 17, 40)]

        def run_often(sums: Sums) -> None:
            for turn in range(10):
                sums.check(context, in_parts=turn % 2 == 1)

        with concurrent.futures.ThreadPoolExecutor(len(work)) as pool:
            for done in [pool.submit(run_often, sums) for sums in work]:
                done.result()


def test_the_interpreter_runs_meanwhile() -> None:
    with NativeContext(torch.float32, 1) as context:
        sums = Sums(context, 20_000, 40)
        counted = 0
        done = threading.Event()

        def run() -> None:
            context.run(sums.ops, sums.step)
            done.set()

        thread = threading.Thread(target=run)
        thread.start()
        while not done.is_set():
            counted += 1
            time.sleep(0)
        thread.join()
        assert counted > 1


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="forking a process with threads is warned of")
def test_a_fork_works_on_one_thread() -> None:
    with NativeContext(torch.bfloat16, 3) as context:
        sums = Sums(context, 50)
        sums.check(context)
        child = os.fork()
        if child == 0:
            try:
                sums.check(context)
                context.close()
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        sums.check(context)
