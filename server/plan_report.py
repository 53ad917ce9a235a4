"""What `octavo plan` prints: the lines that `octavo serve` would print, answers, and the command; or all as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..model.memory import DEFAULT_BATCHED_TOKENS
from ..model.plan import DtypePlan, Limit, ModelPlan, PlanRequest
from ..model.registry import family_note
from ..model.sizes import size_text
from .banner import blocks_text, capacity_lines
from .engine.messages import EngineReady
from .options import OPTIONS

_DEFAULTS = {option.name: option.default for option in OPTIONS}
_NO = "–"
_TABLE_WIDTH = 200


def expected_ready(plan: ModelPlan, values: Mapping[str, Any]) -> EngineReady:
    """What the engine would say of itself, were it started with these settings; `phases` are left empty."""
    spec, request = plan.header.spec, plan.request
    return EngineReady(
        max_model_len=plan.cache.max_model_len,
        max_num_seqs=plan.num_running,
        max_num_waiting=values["max_num_waiting"],
        max_num_batched_tokens=request.max_num_batched_tokens,
        block_size=request.block_size,
        num_blocks=plan.chosen.num_blocks,
        pool_blocks=plan.chosen.pool_blocks,
        kv_cache_bytes=plan.cache.kv_cache_bytes,
        weight_bytes=plan.chosen.weight_bytes,
        vocab_size=spec.vocab_size,
        eos_token_ids=list(spec.eos_token_ids),
        prefix_caching=values["enable_prefix_caching"],
        architecture=spec.architecture,
        dtype=plan.chosen.name,
        device=str(request.device),
        backend=plan.backend_name,
        phases={},
        notes=[*(note for note in (family_note(spec), plan.backend_note) if note), *plan.cache.notes],
    )


def serve_command(plan: ModelPlan, values: Mapping[str, Any]) -> list[str]:
    """`octavo serve` with the settings that make it so, those at their defaults left out where that is safe."""
    request, model = plan.request, values["model"]
    command = ["octavo", "serve"]
    if model is not None:
        command.append(str(Path(model).parent) if Path(model).name == "config.json" else model)
    command += ["--device", request.device.type, "--dtype", plan.chosen.name]
    if request.kernel_backend != _DEFAULTS["kernel_backend"]:
        command += ["--kernel-backend", request.kernel_backend]
    if values["model_impl"] != _DEFAULTS["model_impl"]:
        command += ["--model-impl", values["model_impl"]]
    if values["enable_prefix_caching"] != _DEFAULTS["enable_prefix_caching"]:
        command.append("--enable-prefix-caching" if values["enable_prefix_caching"] else "--no-enable-prefix-caching")
    if request.block_size != _DEFAULTS["block_size"]:
        command += ["--block-size", str(request.block_size)]
    if request.max_num_batched_tokens != DEFAULT_BATCHED_TOKENS[request.device.type]:
        command += ["--max-num-batched-tokens", str(request.max_num_batched_tokens)]
    command += ["--max-num-seqs", str(request.max_num_seqs), "--max-model-len", str(plan.cache.max_model_len)]
    return [*command, "--kv-cache-memory", _flag_size(plan.cache.kv_cache_bytes)]


def _flag_size(num_bytes: int) -> str:
    """Exact, in the largest unit that divides it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes % factor == 0:
            return f"{num_bytes // factor}{unit}"
    return str(num_bytes)


def print_report(plan: ModelPlan, values: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in _head(plan, values, notes):
        console.print(line)
    # Tables are as wide as their columns, whatever the terminal is: a broken cell is harder to read than a broken line.
    tables = Console(width=_TABLE_WIDTH, highlight=False, markup=False)
    tables.print(_dtype_table(plan))
    console.print(f"Sequences that fit at once, in {plan.chosen.name}, with the K/V memory that they take:\n")
    tables.print(_fit_table(plan))
    for line in _tail(plan, values):
        console.print(line)


def _head(plan: ModelPlan, values: Mapping[str, Any], notes: Sequence[str]) -> list[str]:
    header, ready = plan.header, expected_ready(plan, values)
    free = plan.request.free
    stored = "" if header.stored_bytes is None else f", {size_text(header.stored_bytes)} as stored"
    verdict = "fit" if plan.fits else "do not fit"
    lines = [
        "",
        f"Octavo {version('octavo')} plans {header.name}",
        f"  model    {header.num_parameters / 1e6:,.1f} million parameters{stored}; from {header.read}",
        *capacity_lines(ready),
        f"  memory   {size_text(free.free_bytes)} free before the start, {size_text(_spare(plan))} of it left for "
        "activations and everything else",
        f"  layers   {_layers(plan)}",
        *(f"  note     {note}" for note in (*notes, *_window_notes(plan), *header.notes, *ready.notes)),
    ]
    if plan.request.context is not None and plan.request.concurrency is not None:
        lines.append(f"  asked    {plan.concurrency} sequences of {plan.context} tokens {verdict} at once")
    if header.refusal is not None:
        lines.append(f"  served   {header.refusal}")
    return [*lines, ""]


def _window_notes(plan: ModelPlan) -> list[str]:
    if not plan.header.kv_layout.is_windowed:
        return []
    return [
        "windowed layers have pools of their own and give back what has left the window, so sequences can be longer"
    ]


def _spare(plan: ModelPlan) -> int:
    return max(0, plan.request.free.free_bytes - plan.chosen.weight_bytes - plan.cache.kv_cache_bytes)


def _layers(plan: ModelPlan) -> str:
    itemsize = plan.request.dtype.itemsize
    parts = []
    for group in plan.header.kv_layout.groups:
        layer = group.layer
        dims = str(layer.key_dim) if layer.key_dim == layer.value_dim else f"{layer.key_dim} and {layer.value_dim}"
        window = "" if layer.window is None else f", window of {layer.window}"
        per_token = _kib(len(group.layer_ids) * layer.values_per_token * itemsize)
        parts.append(
            f"{len(group.layer_ids)} of {layer.num_kv_heads} K/V heads × {dims}{window}: {per_token} per token"
        )
    return "; ".join(parts)


def _kib(num_bytes: int) -> str:
    return f"{num_bytes / 2**10:g} KiB"


def _dtype_table(plan: ModelPlan) -> Table:
    table = _table("")
    for dtype_plan in plan.by_dtype:
        table.add_column(dtype_plan.name, justify="right")
    concurrency, request = plan.concurrency, plan.request
    sequences = "1 sequence" if concurrency == 1 else f"{concurrency} sequences"
    rows: list[tuple[str, list[str]]] = [
        ("weights", [size_text(p.weight_bytes) for p in plan.by_dtype]),
        ("K/V of a token", [_kib(p.kv_bytes_per_token) for p in plan.by_dtype]),
        ("K/V pool", [_NO if p.cache is None else size_text(p.cache.kv_cache_bytes) for p in plan.by_dtype]),
        ("blocks", [_NO if p.cache is None else blocks_text(p.pool_blocks) for p in plan.by_dtype]),
        ("tokens in the pool", [_NO if p.cache is None else str(_num_tokens(p, request)) for p in plan.by_dtype]),
        (f"longest context of {sequences}", [_limit(p.longest_context) for p in plan.by_dtype]),
        (f"most sequences of {plan.context} tokens", [_limit(p.most_sequences) for p in plan.by_dtype]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _num_tokens(plan: DtypePlan, request: PlanRequest) -> int:
    """Whose K/V the pool holds that keeps the most of each: the first."""
    return plan.pool_blocks[0] * request.block_size


def _limit(limit: Limit) -> str:
    return f"{limit.value or 'none'} ({limit.by})"


def _fit_table(plan: ModelPlan) -> Table:
    table = _table("sequences")
    for column in plan.columns:
        table.add_column(f"{column.context}", justify="right")
    for concurrency in plan.concurrencies:
        cells = [
            size_text(concurrency * column.sequence_bytes) if concurrency <= column.most_sequences else _NO
            for column in plan.columns
        ]
        table.add_row(str(concurrency), *cells)
    table.add_row("at most", *(str(column.most_sequences) for column in plan.columns), style="bold")
    return table


def _table(corner: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(corner, no_wrap=True)
    return table


def _tail(plan: ModelPlan, values: Mapping[str, Any]) -> list[str]:
    if plan.header.refusal is not None:
        return []
    bare = plan.header.read == "config.json" and Path(values["model"]).exists()
    condition = " (with its safetensors beside config.json)" if bare else ""
    return [f"Serve it so{condition}:", f"  {shlex.join(serve_command(plan, values))}", *_other_server(plan), ""]


def _other_server(plan: ModelPlan) -> list[str]:
    """Said where an answer is that of a server with other settings, because this one's pool is sized for more."""
    request, chosen = plan.request, plan.chosen
    context, concurrency = plan.context, plan.concurrency
    if request.concurrency is None:
        concurrency = chosen.most_sequences.value
    elif request.context is None:
        context = chosen.longest_context.value
    elif chosen.most_sequences.value < concurrency:
        return []
    if not context or not concurrency or plan.holds(concurrency, context):
        return []
    return [
        f"Its pool is sized for {plan.num_running} sequences of up to {plan.cache.max_model_len} tokens. To hold "
        f"{concurrency} of {context} tokens at once, plan with --max-num-seqs {concurrency} --max-model-len {context}."
    ]


def print_json(plan: ModelPlan, values: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    print(json.dumps(to_json(plan, values, notes), indent=2, ensure_ascii=False))


def to_json(plan: ModelPlan, values: Mapping[str, Any], notes: Sequence[str] = ()) -> dict[str, Any]:
    """Everything, under names that stay. Sizes are in bytes, lengths in tokens."""
    request, ready = plan.request, expected_ready(plan, values)
    return {
        "octavo": version("octavo"),
        "model": _model_json(plan),
        "memory": {
            "device": request.device.type,
            "free_bytes": request.free.free_bytes,
            "total_bytes": request.free.total_bytes,
        },
        "server": {
            "dtype": ready.dtype,
            "backend": ready.backend,
            "weight_bytes": ready.weight_bytes,
            "kv_cache_bytes": ready.kv_cache_bytes,
            "num_blocks": ready.num_blocks,
            "pool_blocks": ready.pool_blocks,
            "block_size": ready.block_size,
            "max_model_len": ready.max_model_len,
            "max_num_seqs": ready.max_num_seqs,
            "max_num_batched_tokens": ready.max_num_batched_tokens,
            "prefix_caching": ready.prefix_caching,
            "command": None if plan.header.refusal is not None else serve_command(plan, values),
        },
        "asked": {"context": plan.context, "concurrency": plan.concurrency, "fits": plan.fits},
        "dtypes": [_dtype_json(dtype_plan, request) for dtype_plan in plan.by_dtype],
        "contexts": [
            {
                "context": column.context,
                "sequence_bytes": column.sequence_bytes,
                "most_sequences": column.most_sequences,
            }
            for column in plan.columns
        ],
        "notes": [*notes, *_window_notes(plan), *plan.header.notes, *ready.notes],
    }


def _model_json(plan: ModelPlan) -> dict[str, Any]:
    header = plan.header
    return {
        "name": header.name,
        "read": header.read,
        "architecture": header.spec.architecture,
        "served": header.refusal is None,
        "refusal": header.refusal,
        "num_parameters": header.num_parameters,
        "stored_bytes": header.stored_bytes,
        "max_position_embeddings": header.spec.max_position_embeddings,
        "kv_layers": [
            {
                "layers": list(group.layer_ids),
                "num_kv_heads": group.layer.num_kv_heads,
                "key_dim": group.layer.key_dim,
                "value_dim": group.layer.value_dim,
                "window": group.layer.window,
            }
            for group in header.kv_layout.groups
        ],
    }


def _dtype_json(plan: DtypePlan, request: PlanRequest) -> dict[str, Any]:
    return {
        "dtype": plan.name,
        "weight_bytes": plan.weight_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_cache_bytes": None if plan.cache is None else plan.cache.kv_cache_bytes,
        "num_blocks": None if plan.cache is None else plan.num_blocks,
        "pool_blocks": plan.pool_blocks,
        "num_tokens": None if plan.cache is None else _num_tokens(plan, request),
        "max_model_len": None if plan.cache is None else plan.cache.max_model_len,
        "longest_context": {"value": plan.longest_context.value, "limited_by": plan.longest_context.by},
        "most_sequences": {"value": plan.most_sequences.value, "limited_by": plan.most_sequences.by},
        "refusal": plan.refusal,
    }
