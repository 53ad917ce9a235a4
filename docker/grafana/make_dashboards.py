"""Writes the dashboards beside it, in dashboards/. `--check` only says whether they are what this makes of them.

    python docker/grafana/make_dashboards.py [--check] [--prefix vllm:] [--out FOLDER]

The panels are in memory_and_cache.py and throughput_and_latency.py, their shapes in panels.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for `python -P`, which leaves a script's own folder out

import panels  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Write Octavo's Grafana dashboards.")
    parser.add_argument("--out", type=Path, default=HERE / "dashboards", help="folder (default: dashboards/ beside)")
    parser.add_argument("--prefix", default=panels.PREFIX, help="of the metrics' names, as given to --metrics-prefix")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    arguments = parser.parse_args()
    panels.PREFIX = arguments.prefix

    import memory_and_cache
    import throughput_and_latency

    texts = {
        f"{module.UID}.json": json.dumps(module.build(), indent=1) + "\n"
        for module in (memory_and_cache, throughput_and_latency)
    }
    if arguments.check:
        differing = [name for name, text in texts.items() if _read(arguments.out / name) != text]
        for name in differing:
            print(f"{name} is not what make_dashboards.py makes; run it and commit the result", file=sys.stderr)
        return 1 if differing else 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (arguments.out / name).write_text(text, encoding="utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
