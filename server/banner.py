"""What a user sees when the server is ready."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from ..model.sizes import size_text
from ..model.weights.resolve import ModelFiles
from .config import ServerConfig
from .engine.messages import EngineReady


def banner(
    config: ServerConfig, files: ModelFiles, ready: EngineReady, address: Any, seconds: float, *, chats: bool
) -> str:
    """`address` is the listening socket's; `seconds` are those since the process was started."""
    host, port = address[0], address[1]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    name = config.served_model_names[0]
    phases = " · ".join(f"{phase} {value:.2f}" for phase, value in ready.phases.items())
    lines = [
        "",
        f"Octavo {version('octavo')} serves {name}",
        f"  model    {files.path}",
        *capacity_lines(ready),
        *(f"  note     {note}" for note in ready.notes),
        f"  ready    {seconds:.2f} s after the start (engine: {phases})",
        "",
        f"  API      {url}/v1     docs {url}/docs     metrics {url}/metrics",
        "",
        "Try it:",
        *_curl(url, name, bool(config.api_keys), chats),
        "",
    ]
    return "\n".join(lines)


def capacity_lines(ready: EngineReady) -> list[str]:
    """Weights, pool and limits; `octavo plan` says them in the same words before an engine is started."""
    cache = "on" if ready.prefix_caching else "off"
    return [
        f"           {ready.architecture}, {ready.dtype} on {ready.device}, {ready.backend} backend, "
        f"weights {size_text(ready.weight_bytes)}",
        f"  K/V pool {size_text(ready.kv_cache_bytes)}: {blocks_text(ready.pool_blocks)} blocks of "
        f"{ready.block_size} tokens, prefix cache {cache}",
        f"  limits   {ready.max_model_len} tokens per sequence, {ready.max_num_seqs} sequences at once, "
        f"{ready.max_num_batched_tokens} tokens per step",
    ]


def blocks_text(pool_blocks: Sequence[int]) -> str:
    """Layers with a window have a pool of their own."""
    return " + ".join(map(str, pool_blocks))


def _curl(url: str, name: str, needs_key: bool, chats: bool) -> list[str]:
    """Something to paste into a shell. A model without a chat template is one that continues texts."""
    asked = '"messages": [{"role": "user", "content": "Why is the sky blue?"}]'
    path = "chat/completions"
    if not chats:
        path, asked = "completions", '"max_tokens": 64, "prompt": "The sky is blue because"'
    body = f'{{"model": "{name}", "stream": true, "temperature": 0.3, {asked}}}'
    key = ['    -H "Authorization: Bearer $OCTAVO_API_KEY" \\'] if needs_key else []
    return [f"  curl -N {url}/v1/{path} -H 'Content-Type: application/json' \\", *key, f"    -d '{body}'"]
