"""Render docs/models.md's table of what is served from docs/models.json, which tests wrote as they passed.

make models-table                       # runs those tests, and writes the table between its markers
python bench/models_table.py            # writes it from what was recorded
python bench/models_table.py --check    # status 1 if the page says something else
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- begin: bench/models_table.py -->", "<!-- end -->"
_NO = "–"
_CPU = {"cpu": "native kernels", "reference": "plain torch"}

Facts = dict[str, str]


def render(records: dict[str, Facts]) -> str:
    """A row for each architecture that some test has shown to work; a cell says only what a test has shown."""
    found: defaultdict[tuple[str, str], list[Facts]] = defaultdict(list)
    for facts in records.values():
        found[facts["path"], facts["architecture"]].append(facts)
    lines = [
        "| architecture | computed by | safetensors | GGUF | CPU | GPU |",
        "|---|---|---|---|---|---|",
    ]
    for (path, architecture), rows in sorted(found.items(), key=lambda item: (item[0][0] != "native", item[0][1])):
        backends = {row["backend"] for row in rows}
        cells = [
            architecture,
            "Octavo" if path == "native" else "transformers",
            _weights("safetensors", rows),
            _weights("GGUF", rows),
            ", ".join(_CPU[name] for name in _CPU if name in backends) or _NO,
            "interpreter" if "triton" in backends else _NO,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _weights(kind: str, rows: Iterable[Facts]) -> str:
    """ "yes", and the encodings that a test has served beside plain floats."""
    stated = [row["weights"] for row in rows if row["weights"].split()[0] == kind]
    encodings = sorted({text.removeprefix(kind).strip() for text in stated} - {""})
    return ", ".join(["yes", *encodings]) if stated else _NO


def updated(page: str, table: str) -> str:
    """The page with the table between its markers."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n{table}\n{page[end:]}"


def main(arguments: list[str]) -> int:
    path = DOCS / "models.md"
    page = path.read_text(encoding="utf-8")
    wanted = updated(page, render(json.loads((DOCS / "models.json").read_text(encoding="utf-8"))))
    if arguments == ["--check"]:
        if page != wanted:
            print("docs/models.md does not say what docs/models.json does: run bench/models_table.py", file=sys.stderr)
        return int(page != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
