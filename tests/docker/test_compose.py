"""compose.yaml and what it mounts fit each other, and Octavo. Nothing is started here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring_files import DOCKER, PROMETHEUS
from octavo.server.options import OPTIONS


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


COMPOSE = load(DOCKER / "compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_this_machine_only(name: str) -> None:
    for port in SERVICES[name]["ports"]:
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port)


@pytest.mark.parametrize("name", SERVICES)
def test_services_can_do_no_more_than_they_need(name: str) -> None:
    assert SERVICES[name]["cap_drop"] == ["ALL"]
    assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_images_of_others_are_pinned(name: str) -> None:
    assert re.fullmatch(r"\w+/\w+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_every_mount_exists() -> None:
    volumes = set(COMPOSE["volumes"])
    used = set()
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source, _, mode = volume.split(":")[0], *volume.partition(":")[2].rpartition(":")[::2]
            if source.startswith("."):
                assert (DOCKER / source).is_dir(), source
                assert mode == "ro"
            else:
                used.add(source)
    assert used == volumes


def test_settings_are_octavos() -> None:
    known = {option.env for option in OPTIONS}
    for settings in (SERVICES["octavo"], load(DOCKER / "compose.gpu.yaml")["services"]["octavo"]):
        ours = {name for name in settings["environment"] if name.startswith("OCTAVO_")}
        assert ours
        assert ours <= known


def test_nothing_starts_without_a_word_on_who_may_call() -> None:
    environment = SERVICES["octavo"]["environment"]
    assert environment["OCTAVO_API_KEY"].startswith("${OCTAVO_API_KEY?"), "unset: compose says so and stops"
    assert environment["OCTAVO_ALLOW_ANONYMOUS"] == "${OCTAVO_ALLOW_ANONYMOUS-}"


def test_a_drain_fits_into_the_grace_period() -> None:
    octavo = SERVICES["octavo"]
    assert (
        int(octavo["stop_grace_period"].removesuffix("s")) >= int(octavo["environment"]["OCTAVO_SHUTDOWN_TIMEOUT"]) + 10
    )
    assert octavo["init"] is True


def test_services_wait_for_what_can_tell_that_it_is_ready() -> None:
    for service in SERVICES.values():
        for name, needed in service.get("depends_on", {}).items():
            if needed["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name]


def test_builds_name_targets_of_the_dockerfile() -> None:
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    build = SERVICES["octavo"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
    gpu = load(DOCKER / "compose.gpu.yaml")["services"]
    assert gpu.keys() <= SERVICES.keys()
    assert {build["target"], gpu["octavo"]["build"]["target"]} <= set(stages)
    (device,) = gpu["octavo"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]


def test_prometheus_scrapes_octavo_and_grafana_asks_prometheus() -> None:
    config = load(PROMETHEUS / "prometheus.yml")
    (job,) = config["scrape_configs"]
    port = SERVICES["octavo"]["ports"][0].rsplit(":", 1)[1]
    assert job["static_configs"] == [{"targets": [f"octavo:{port}"]}]
    assert f"--config.file=/etc/prometheus/{PROMETHEUS.name}.yml" in SERVICES["prometheus"]["command"]
    assert "./prometheus:/etc/prometheus:ro" in SERVICES["prometheus"]["volumes"]
    (source,) = load(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == f"http://prometheus:{SERVICES['prometheus']['ports'][0].rsplit(':', 1)[1]}"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_grafana_finds_the_dashboards() -> None:
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in SERVICES["grafana"]["volumes"])
    (provider,) = load(DOCKER / "grafana/provisioning/dashboards/octavo.yaml")["providers"]
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == mounts["./grafana/dashboards"]
    assert json.loads((DOCKER / "grafana/dashboards" / home.name).read_text(encoding="utf-8"))["title"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_the_example_names_what_the_files_ask_for() -> None:
    example = (DOCKER / ".env.example").read_text(encoding="utf-8")
    named = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    asked = set(re.findall(r"\$\{([A-Z_]+)", (DOCKER / "compose.yaml").read_text(encoding="utf-8")))
    assert named == {name for name in asked if not name.endswith("_PUBLISHED_PORT")}
    assert not re.search(r"KEY=.", example), "no key that everybody knows"
