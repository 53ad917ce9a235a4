"""The few shapes of Grafana panels that the dashboards use, as functions that return Grafana's JSON.

Standard library only. `$model_name`, `$instance` and `$engine` are the dashboards' variables; `$__rate_interval` and
`$__range` are Grafana's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Json = dict[str, Any]

PREFIX = "octavo:"
"""Of Octavo's metrics (`--metrics-prefix`). Those of HTTP and of the process have none, as is usual."""
SERVED = 'model_name=~"$model_name",instance=~"$instance",engine=~"$engine"'
"""Labels of a metric that belongs to one engine."""
SERVER = 'instance=~"$instance"'
"""Labels of a metric of the HTTP process."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GRID_COLUMNS = 24
GREEN, YELLOW, RED = "green", "yellow", "red"


class Query(NamedTuple):
    """One PromQL expression, and what its curves are called (`{{label}}` is replaced)."""

    expr: str
    legend: str


def metric(name: str, labels: str = "") -> str:
    """A metric of the chosen engines; `labels` are more matchers."""
    return f"{PREFIX}{name}{{{SERVED}{',' + labels if labels else ''}}}"


def rate(name: str, labels: str = "") -> str:
    """A counter's increase per second."""
    return f"rate({metric(name, labels)}[$__rate_interval])"


def total_rate(name: str, labels: str = "", by: str = "") -> str:
    """The same, summed over engines, or for each value of the label `by`."""
    return f"sum{f' by ({by})' if by else ''} ({rate(name, labels)})"


def quantile(name: str, share: float) -> str:
    """An upper quantile of a histogram, interpolated within its bucket; `share` is 0.95 for p95."""
    return f"histogram_quantile({share}, sum by (le) ({rate(name + '_bucket')}))"


def quantiles(name: str) -> list[Query]:
    """p50, p95 and p99."""
    return [Query(quantile(name, share), legend) for share, legend in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))]


def steps(*levels: tuple[float | None, str]) -> list[Json]:
    """Colours from a value on: the first has None for "from the bottom"."""
    return [{"value": value, "color": color} for value, color in levels]


def timeseries(
    title: str,
    description: str,
    queries: Sequence[Query],
    *,
    unit: str,
    width: int = 8,
    stacked: bool = False,
    highest: float | None = None,
    thresholds: Sequence[Json] = (),
    log: bool = False,
) -> Json:
    """Curves over time. `thresholds`, if given, are drawn as lines; `log` is for what spans decades."""
    custom: Json = {
        "drawStyle": "line",
        "fillOpacity": 30 if stacked else 8,
        "lineWidth": 1,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
        "thresholdsStyle": {"mode": "dashed" if thresholds else "off"},
    }
    defaults: Json = {"unit": unit, "min": None if log else 0, "max": highest, "custom": custom}
    defaults["thresholds"] = {"mode": "absolute", "steps": list(thresholds) or steps((None, GREEN))}
    return _panel("timeseries", title, description, queries, defaults, width, height=8) | {
        "options": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    }


def stat(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    thresholds: Sequence[Json],
    names: dict[str, str] | None = None,
    width: int = 4,
) -> Json:
    """One number, coloured. `names` replace values, such as 1 by "up"."""
    defaults: Json = {"unit": unit, "thresholds": {"mode": "absolute", "steps": list(thresholds)}}
    if names:
        texts = {value: {"text": text, "index": index} for index, (value, text) in enumerate(names.items())}
        defaults["mappings"] = [{"type": "value", "options": texts}]
    return _panel("stat", title, description, [query], defaults, width, height=4) | {
        "options": {
            "colorMode": "value",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "auto",
        }
    }


def heatmap(title: str, description: str, histogram: str, *, unit: str, width: int = 12) -> Json:
    """How many observations fell into each bucket of a histogram, over time."""
    query = Query(f"sum by (le) (increase({metric(histogram + '_bucket')}[$__rate_interval]))", "{{le}}")
    panel = _panel("heatmap", title, description, [query], {"custom": {}}, width, height=9)
    panel["targets"][0]["format"] = "heatmap"
    panel["options"] = {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "tooltip": {"mode": "single", "yHistogram": True},
        "yAxis": {"unit": unit, "axisPlacement": "left"},
    }
    return panel


def _panel(
    kind: str, title: str, description: str, queries: Sequence[Query], defaults: Json, width: int, height: int
) -> Json:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": query.expr, "legendFormat": query.legend}
        for index, query in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
        "gridPos": {"w": width, "h": height, "x": 0, "y": 0},
    }


def row(title: str, *panels: Json) -> list[Json]:
    """A heading and the panels below it, which `dashboard` places."""
    heading = {"type": "row", "title": title, "collapsed": False, "panels": []}
    return [heading | {"gridPos": {"w": GRID_COLUMNS, "h": 1, "x": 0, "y": 0}}, *panels]


def choice(name: str, label: str, values: Sequence[str], default: str) -> Json:
    """A variable with fixed values."""
    options = [{"text": value, "value": value, "selected": value == default} for value in values]
    return {
        "type": "custom",
        "name": name,
        "label": label,
        "query": ",".join(values),
        "options": options,
        "current": {"text": default, "value": default},
        "includeAll": False,
        "multi": False,
    }


def _labels_of(name: str, label: str, matchers: str) -> Json:
    """A variable that takes the values of a label, all of them at first."""
    query = f"label_values({PREFIX}num_requests_running{{{matchers}}}, {name})"
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "query": {"qryType": 1, "query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "includeAll": True,  # without an allValue: "All" is these values, so that `instance` finds no other services
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard(uid: str, title: str, description: str, rows: Sequence[list[Json]], variables: Sequence[Json]) -> Json:
    """A whole dashboard; panels flow from left to right and get ids in order."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["octavo"],
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"},
                _labels_of("model_name", "Model", ""),
                _labels_of("instance", "Instance", 'model_name=~"$model_name"'),
                _labels_of("engine", "Engine", 'model_name=~"$model_name",instance=~"$instance"'),
                *variables,
            ]
        },
        "annotations": {"list": [_restarts()]},
        "links": [{"type": "dashboards", "title": "Octavo", "tags": ["octavo"], "keepTime": True, "includeVars": True}],
        "panels": _placed(rows),
    }


def _restarts() -> Json:
    return {
        "name": "Engine restarts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": RED,
        "expr": f"changes({metric('engine_restarts_total')}[$__rate_interval]) > 0",
        "titleFormat": "engine restarted",
    }


def _placed(rows: Sequence[list[Json]]) -> list[Json]:
    placed: list[Json] = []
    x = y = height = 0
    for panel in (panel for row in rows for panel in row):
        size = panel["gridPos"]
        if panel["type"] == "row" or x + size["w"] > GRID_COLUMNS:
            x, y, height = 0, y + height, 0
        placed.append({"id": len(placed) + 1, **panel, "gridPos": size | {"x": x, "y": y}})
        x, height = x + size["w"], max(height, size["h"])
    return placed
