"""Prometheus' rules and Grafana's dashboards, as files. tests/integration/test_dashboards.py runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring_files import (
    DOCKER,
    PROMETHEUS,
    ROOT,
    annotation_expressions,
    dashboards,
    panel_expressions,
    panels,
    rules,
    tool,
)

ALERTS = rules("alert")
MANUAL = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")


def promtool(*arguments: str | Path) -> None:
    command = [tool("promtool"), *map(str, arguments)]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_configuration() -> None:
    promtool("check", "config", "prometheus.yml")


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_tested_firing_and_silent() -> None:
    content = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))
    cases = [case for test in content["tests"] for case in test["alert_rule_test"]]
    names = {alert["alert"] for alert in ALERTS}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alerts_say_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert {"summary", "description"} < set(alert["annotations"])
    page, anchor = alert["annotations"]["runbook"].split("#")
    assert page == "docs/monitoring.md"
    assert anchor == alert["alert"].lower()
    assert re.search(rf"^#+ {alert['alert']}$", MANUAL, re.MULTILINE), "no such section in the manual"


def test_dashboards_are_what_the_generator_makes() -> None:
    command = [sys.executable, "-P", str(DOCKER / "grafana" / "make_dashboards.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_generator_writes_for_another_prefix(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCKER / "grafana" / "make_dashboards.py"), "--prefix", "vllm:"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True)
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert made.keys() == dashboards().keys()
    for text in made.values():
        assert "vllm:num_requests_running" in text
        assert "octavo:" not in text
    changed = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert changed.returncode == 1
    assert "run it and commit the result" in changed.stderr


@pytest.mark.parametrize("name", dashboards())
def test_panels_are_complete(name: str) -> None:
    dashboard = dashboards()[name]
    assert dashboard["uid"] == name.removesuffix(".json")
    known = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval", "__range"}
    for panel in panels(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        unit = panel["fieldConfig"]["defaults"].get("unit") or panel["options"]["yAxis"]["unit"]
        assert unit, panel["title"]
        for target in panel["targets"]:
            assert target["legendFormat"], panel["title"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= known, panel["title"]
        assert f"**{panel['title']}**" in MANUAL, f"the manual does not explain {panel['title']}"


RED_LINES = {
    "K/V pool in use": "OctavoCacheNearlyFull",
    "Engine's last message": "OctavoEngineSilent",
    "Time to first token": "OctavoSlowFirstToken",
    "Time between tokens": "OctavoSlowTokens",
}
"""Panel → the alert whose limit it draws."""


def test_red_lines_are_the_limits_that_alerts_use() -> None:
    limits = {alert["alert"]: alert["expr"] for alert in ALERTS}
    drawn = set()
    for dashboard in dashboards().values():
        for panel in panels(dashboard):
            steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
            for line in steps[1:] if panel["type"] == "timeseries" else []:
                if line["color"] == "red":
                    drawn.add(panel["title"])
                    assert re.search(rf"> {line['value']}\b", limits[RED_LINES[panel["title"]]]), panel["title"]
    assert drawn == RED_LINES.keys()


@pytest.mark.parametrize("name", dashboards())
def test_panels_lie_side_by_side(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    dashboard = dashboards()[name]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        size = panel["gridPos"]
        assert size["x"] + size["w"] <= 24
        for x in range(size["x"], size["x"] + size["w"]):
            for y in range(size["y"], size["y"] + size["h"]):
                assert (x, y) not in taken, f"{panel['title']} covers {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_every_expression_is_promql(tmp_path: Path) -> None:
    expressions = panel_expressions() + annotation_expressions()
    assert len(expressions) > 60
    recorded = [{"record": f"expression_{index}", "expr": item.expr} for index, item in enumerate(expressions)]
    path = tmp_path / "expressions.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": recorded}]}))
    promtool("check", "rules", path)
