"""What docker/ ships for Prometheus and Grafana, read for the tests here and for the live one in tests/integration."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PROMETHEUS = DOCKER / "prometheus"
DASHBOARDS = DOCKER / "grafana" / "dashboards"


class Expression(NamedTuple):
    """A PromQL expression, and where it stands."""

    where: str
    expr: str


def tool(name: str) -> str:
    """Path of Debian's prometheus or promtool. Without it, tests are skipped, but never in CI."""
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed (make monitoring-tools)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard by file name."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(DASHBOARDS.glob("*.json"))}


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Its panels without the headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def panel_expressions() -> list[Expression]:
    """Every query of every panel and annotation, as Grafana would send it when nothing has been chosen yet."""
    found = []
    for name, dashboard in dashboards().items():
        values = {
            variable["name"]: variable["current"]["value"]
            for variable in dashboard["templating"]["list"]
            if "current" in variable
        }
        for panel in panels(dashboard):
            for target in panel["targets"]:
                where = f"{name}: {panel['title']} ({target['legendFormat']})"
                found.append(Expression(where, substituted(target["expr"], values)))
    return found


def annotation_expressions() -> list[Expression]:
    """Those that mark moments; no data is their usual answer."""
    return [
        Expression(f"{name}: {annotation['name']}", substituted(annotation["expr"], {}))
        for name, dashboard in dashboards().items()
        for annotation in dashboard["annotations"]["list"]
    ]


def substituted(expr: str, values: Mapping[str, str], interval: str = "1m") -> str:
    """Variables replaced: what stands for "all" by a pattern that any value matches."""
    values = {"__rate_interval": interval, "__range": "30m", **values}

    def value(match: re.Match[str]) -> str:
        chosen = values.get(match[1], "$__all")
        return ".+" if chosen == "$__all" else chosen

    return re.sub(r"\$(\w+)", value, expr)


def rules(kind: str) -> list[dict[str, Any]]:
    """The rules of a kind, "record" or "alert", in the order of the file."""
    content = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"] if kind in rule]
