"""Compiles every kernel that ships, for every GPU it ships for, on a machine without one; fails where one got worse.

    .venv/bin/python bench/aot.py            the whole set; what is in Triton's cache is not compiled again
    .venv/bin/python bench/aot.py --quick    what the best-known models launch in bf16; about a minute on two cores
    .venv/bin/python bench/aot.py --write bench/results/aot      also leaves aot.md and aot.json there

What is compiled is what would be launched: the wrappers in kernels/triton run on empty tensors, and instead of being
launched, kernels have their arguments specialised by Triton itself (types, divisibility by 16, ones) for the target.
Status 1 if anything wants more shared memory than the target has, or if a matrix product or attention spills
registers or lost its matrix instructions, or attention the pipelining of its loads; and if a kernel would be compiled
anew for another batch of the same model.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

# What launches get today; unset, it is a warning per process.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from aot_cases import ATTENTION, LAUNCHES, ODD, OTHERS, Batch, Shape, cases
from octavo.kernels.triton import tuning
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

TARGETS = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
SHARED_PER_SM_KIB = {80: 164, 90: 228, 100: 228}
REGISTERS_PER_SM = 64 * KIB
THREADS_PER_SM = 2048


# ---- What Triton would compile ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel's launch, specialised."""

    kernel: str
    source: ASTSource
    options: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.source.hash(), repr(sorted(self.options.items()))

    @property
    def constants(self) -> dict[str, Any]:
        return {self.source.fn.arg_names[path[0]]: value for path, value in self.source.constants.items()}


@contextmanager
def recording(target: GPUTarget) -> Iterator[list[Launch]]:
    """Instead of being launched, kernels are specialised as the launcher would for the target, and noted."""
    backend, launches = make_backend(target), list[Launch]()

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialisation, options = bind(*args, **kwargs)
        packed = kernel._pack_args(backend, kwargs, bound, specialisation, options)
        launches.append(Launch(kernel.__name__, ASTSource(kernel, *packed[1:]), packed[0].__dict__))

    with mock.patch.object(jit.JITFunction, "run", record):
        yield launches


def launches_of(operator: str, shape: Shape, batch: Batch, capability: int) -> list[Launch]:
    with recording(GPUTarget("cuda", capability, 32)) as launches:
        LAUNCHES[operator](shape, batch, capability)
    return launches


# ---- What came of it -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Result:
    operator: str
    kernel: str
    capability: int
    shapes: list[str]
    config: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs_per_sm: int
    matrix: str
    """Instructions by kind, as in `wgmma 24`."""
    async_copies: int
    pipelined: str
    """Loops whose loads all run ahead, of all loops."""
    cpu_s: float | None
    """Of this process and ptxas; None: it was compiled before, and read from Triton's cache."""
    problems: list[str]


def compile_one(operator: str, shape: Shape, capability: int, index: int) -> Result:
    """The index-th kernel that the operator launches."""
    started = cpu_seconds()
    launch = launches_of(operator, shape, ODD, capability)[index]
    hits = list[bool]()
    triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    compiled = triton.compile(launch.source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx, used = compiled.asm["ptx"], resources(compiled.asm["cubin"])
    matrix = {kind: len(re.findall(rf"\b{name}\b", ptx)) for kind, name in MATRIX.items()}
    ahead, loops = pipelined_loops(compiled.asm["ttgir"])
    warps, shared = launch.options["num_warps"], compiled.metadata.shared
    sizes = {name.lower(): value for name, value in launch.constants.items() if name in ("ROWS", "TILE", "CHUNK")}
    config = [f"{name} {value}" for name, value in {**sizes, "warps": warps}.items()]
    if loops:
        config.append(f"stages {launch.options['num_stages']}")
    result = Result(
        operator=operator,
        kernel=launch.kernel,
        capability=capability,
        shapes=[label(operator, shape)],
        config=", ".join(config),
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared,
        programs_per_sm=programs_per_sm(capability, used["REG"], 32 * warps, shared),
        matrix=", ".join(f"{kind} {count}" for kind, count in matrix.items() if count) or "–",
        async_copies=len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)),
        pipelined=f"{ahead}/{loops}" if loops else "–",
        cpu_s=None if all(hits) else cpu_seconds() - started,
        problems=[],
    )
    result.problems = list(problems(result, shape, matrix, ahead < loops))
    return result


MATRIX = {"mma": r"mma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma"}
MATRIX_OF_PREFILL = {80: "mma", 90: "wgmma", 100: "tcgen05"}
WATCHED = ("decode_kernel", "prefill_kernel", "matmul_kernel", "experts_kernel")


def problems(result: Result, shape: Shape, matrix: dict[str, int], waits: bool) -> Iterator[str]:
    if result.shared_bytes > tuning.shared_limit(result.capability):
        yield f"wants {result.shared_bytes} bytes of shared memory"
    if result.kernel not in WATCHED:
        return  # elsewhere ptxas may give up a few bytes for one program more per SM
    if result.spilled_bytes:
        yield f"spills {result.spilled_bytes} bytes"
    attention = result.kernel != "matmul_kernel"
    if result.kernel == "decode_kernel" and shape.num_heads == shape.num_kv_heads:
        return  # MHA: products element by element, by design
    # Decode's 16 rows are too few for wgmma and tcgen05, which take 64 or more.
    wanted = {"decode_kernel": ["mma"], "prefill_kernel": [MATRIX_OF_PREFILL[result.capability]]}
    kinds = wanted.get(result.kernel, list(MATRIX))
    # Attention's fp32 products are exact and have none.
    if not any(matrix[kind] for kind in kinds) and not (attention and shape.dtype == "float32"):
        yield f"has no {' or '.join(kinds)} instruction"
    if attention and waits:
        yield "waits for its loads"


def pipelined_loops(ttgir: str) -> tuple[int, int]:
    """(loops without a load that is waited for, loops that load at all), of those that hold no other loop."""
    bodies = list[str]()
    # Looked for behind an assertion, matches may overlap: those of inner loops are found as well.
    for found in re.finditer(r"^(?=(( +)[^\n]*\bscf\.for\b.*?^\2\}))", ttgir, re.DOTALL | re.MULTILINE):
        bodies += [found[1]] if found[1].count("scf.for") == 1 else []
    loading = [body for body in bodies if "tt.load" in body or "async_copy_global_to_local" in body]
    return sum("tt.load" not in body for body in loading), len(loading)


def resources(cubin: bytes) -> dict[str, int]:
    """REG (per thread), STACK, LOCAL (bytes per thread: nothing of ours lives there but spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def programs_per_sm(capability: int, registers: int, threads: int, shared: int) -> int:
    """Registers are given out to warps by 8 per thread; a program's shared memory costs 1 KiB more than it asks for."""
    by_registers = REGISTERS_PER_SM // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED_PER_SM_KIB[capability] * KIB // (shared + KIB)
    return min(by_registers, by_shared, THREADS_PER_SM // threads, 32)


def cpu_seconds() -> float:
    """Of this process and of what it ran (ptxas): says what a compile costs on a busy machine too."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def label(operator: str, shape: Shape) -> str:
    """What the operator's kernels depend on."""
    if operator == "quantised":
        return f"{shape.encoding}, {shape.dtype}"
    if operator not in (*ATTENTION, "rope"):
        return f"{shape.name}, {shape.dtype}"
    group = shape.num_heads // shape.num_kv_heads
    extras = [f"window {shape.window}"] if shape.window else []
    extras += [f"soft cap {shape.soft_cap:g}"] if shape.soft_cap else []
    return ", ".join(
        [shape.name, f"head {shape.head_dim}", f"group {group}", f"block {shape.block}", *extras, shape.dtype]
    )


# ---- The command -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Job:
    """Arguments of `compile_one`, and every shape that launches what they name."""

    arguments: tuple[str, Shape, int, int]
    shapes: list[str]


def unique_jobs(quick: bool, targets: Iterable[int]) -> list[Job]:
    jobs: dict[tuple[object, ...], Job] = {}
    for capability in targets:
        for operator, shape in cases(quick):
            for index, launch in enumerate(launches_of(operator, shape, ODD, capability)):
                job = jobs.setdefault((capability, *launch.key), Job((operator, shape, capability, index), []))
                if label(operator, shape) not in job.shapes:
                    job.shapes.append(label(operator, shape))
    # The longest compiles first, so that no worker is left with one at the end.
    return sorted(jobs.values(), key=lambda job: (job.arguments[0] != "prefill", job.arguments[0] != "decode"))


def variants(quick: bool, capability: int) -> list[str]:
    """Kernels that are compiled again for another batch of the same model: a second's pause while serving."""
    found = Counter[str]()
    for operator, shape in cases(quick):
        by_batch = [launches_of(operator, shape, batch, capability) for batch in (ODD, *OTHERS)]
        for same in zip_longest(*by_batch):
            keys = {launch.key for launch in same if launch}
            kernel = next(launch.kernel for launch in same if launch)
            found[kernel] = max(found[kernel], len(keys))
    return [f"{kernel}: {count} for one shape" for kernel, count in found.items() if count > 1]


def compile_all(jobs: list[Job], workers: int) -> list[Result]:
    results = []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(compile_one, *job.arguments): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            result = future.result()
            result.shapes = futures[future].shapes
            results.append(result)
            line = f"sm_{result.capability} {result.kernel:18} {result.shapes[0]} ({result.config})"
            verdict = "; ".join(result.problems) or "ok"
            print(f"{len(results)}/{len(jobs)} {line} {verdict}", file=sys.stderr, flush=True)
    order = list(LAUNCHES)
    return sorted(results, key=lambda r: (order.index(r.operator), r.kernel, r.capability, r.shapes[0], r.config))


COLUMNS = ("target", "shape", "config", "registers", "spilled B", "shared KiB", "programs/SM", "matrix", "cp.async")
COLUMNS_AFTER = ("pipelined loops", "CPU s", "")


def markdown(results: list[Result], again: list[str], command: str) -> str:
    lines = [
        "# Ahead-of-time compiles",
        "",
        f"`{command}`, Triton {triton.__version__}: {len(results)} specialisations, "
        f"{sum(result.cpu_s or 0.0 for result in results):.0f} CPU seconds for those not in Triton's cache, "
        f"{sum(bool(result.problems) for result in results)} with problems. "
        "Nothing here was run; programs/SM is what registers and shared memory allow.",
        "",
    ]
    if again:
        lines += ["Compiled again for some batches (arguments that are 1, multiples of 16, or unaligned views):", ""]
        lines += [*(f"- {line}" for line in again), ""]
    for kernel in dict.fromkeys(result.kernel for result in results):
        columns = (*COLUMNS, *COLUMNS_AFTER)
        lines += [f"## {kernel}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for r in (result for result in results if result.kernel == kernel):
            cost = "cached" if r.cpu_s is None else f"{r.cpu_s:.1f}"
            verdict = f"**{'; '.join(r.problems)}**" if r.problems else ""
            cells = (f"sm_{r.capability}", "<br>".join(r.shapes), r.config, r.registers, r.spilled_bytes,
                     f"{r.shared_bytes / KIB:.1f}", r.programs_per_sm, r.matrix, r.async_copies, r.pipelined,
                     cost, verdict)  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", type=Path, help="path without suffix for .md and .json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile")
    jobs = unique_jobs(options.quick, options.targets)
    again = variants(options.quick, options.targets[0])
    results = compile_all(jobs, options.workers)
    text = markdown(results, again, " ".join(["bench/aot.py", *sys.argv[1:]]))
    print(text)
    if options.write:
        options.write.with_suffix(".md").write_text(text, encoding="utf-8")
        content = {"triton": triton.__version__, "results": [asdict(result) for result in results]}
        options.write.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    failed = [result for result in results if result.problems]
    for r in failed:
        where = f"sm_{r.capability} {r.kernel} {r.shapes[0]} ({r.config})"
        print(f"FAILED {where}: {'; '.join(r.problems)}", file=sys.stderr)
    for line in again:
        print(f"FAILED compiled again for another batch: {line}", file=sys.stderr)
    return 1 if failed or again else 0


if __name__ == "__main__":
    sys.exit(main())
