"""Every expression of docker/'s dashboards and alerts, run by a real Prometheus that scrapes a loaded Octavo.

The model is a tiny random one and its pool holds two sequences' tokens, so that within seconds there are prefix hits,
evictions, preemptions, a full queue, mistakes of callers, and an engine that dies.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
import torch
import yaml
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from conftest import ServerProcess  # type: ignore[import-not-found]

sys.path.append(str(Path(__file__).parents[1] / "docker"))

from monitoring_files import PROMETHEUS, Expression, annotation_expressions, panel_expressions, rules, tool

MODEL = "tiny"
BLOCK_TOKENS = 16
RULES = [*rules("record"), *rules("alert")]
COMPARISON = re.compile(r"(==|>|<) (?=[\d.]+)")
SELECTOR = re.compile(r"(?:octavo:|http_|process_|up\b)[\w:]*(?:\{[^}]*\})?")


def save_tiny_model(path: Path) -> None:
    """A random Llama whose tokens are the 256 bytes; an endless talker, for lack of an end token."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text("{}")


class Prometheus:
    """A real one, with the shipped configuration: only target and intervals differ, so that a test need not wait."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.url = f"http://{address}"
        self._log = (folder / "prometheus.log").open("w+")
        self._popen = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=warn",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )

    def ready(self) -> bool:
        if self._popen.poll() is not None:
            self._log.seek(0)
            raise AssertionError(f"Prometheus ended: {self._log.read()}")
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an API call."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def values(self, expr: str) -> list[float]:
        """The values that an expression has now, one for each series; those that are no number are left out."""
        found = [float(series["value"][1]) for series in self.get("query", query=expr)["result"]]
        return [value for value in found if not math.isnan(value)]

    def stop(self) -> None:
        self._popen.terminate()
        self._popen.wait(60)
        self._log.close()


@pytest.fixture
def octavo(start_server: Callable[..., ServerProcess], tmp_path: Path) -> Iterator[ServerProcess]:
    path = tmp_path / MODEL
    save_tiny_model(path)
    # 2 layers x 2 (K and V) x 2 heads x 16 dimensions x 4 bytes: 512 bytes per token.
    server = start_server(
        *("--model", str(path), "--dtype", "float32", "--kv-cache-memory", f"{25 * BLOCK_TOKENS * 512}"),
        *("--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "4", "--max-num-waiting", "4"),
        env={"OMP_NUM_THREADS": "1"},  # threads that wait for each other cost more than so small a model
    )
    yield server
    server.stop()


@pytest.fixture
def prometheus(octavo: ServerProcess, tmp_path: Path) -> Iterator[Prometheus]:
    """After a load that has given every metric something to say."""
    process = Prometheus(tmp_path, octavo.url.removeprefix("http://"))
    try:
        wait_until(process.ready, "Prometheus is ready")
        # Before the load, so that the counters' zeros are known and their increase is seen.
        wait_until(lambda: bool(process.values("octavo:request_prompt_tokens_count")), "metrics are scraped")
        load(octavo)
        kill_engine_under_load(octavo)
        seen = "octavo:engine_restarts_total == 1 and octavo:engine_up == 1"
        wait_until(lambda: bool(process.values(seen)), "the restart is scraped")
        run_clients(octavo, 4)
        total = octavo.metric("generation_tokens_total")
        wait_until(lambda: process.values("octavo:generation_tokens_total") == [total], "all of the load is scraped")
        wait_until(lambda: all(rule["health"] == "ok" for rule in process_rules(process)), "rules were evaluated")
        yield process
    finally:
        process.stop()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    pause = threading.Event()
    for _ in range(int(seconds / 0.1)):
        if condition():
            return
        pause.wait(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def process_rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]


def body(text: str, **fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": text, "max_tokens": 80, "ignore_eos": True, **fields}


def client(server: ServerProcess, index: int) -> None:
    """One caller: alike beginnings for hits, others for evictions; streams, parallel samples, and mistakes."""
    shared = "All of these requests begin with the same few words. "
    own = f"{index} is the number of this one, which nobody else has. "
    if index % 4 == 0:
        request = urllib.request.Request(
            server.url + "/v1/completions",
            json.dumps(body(own * 2, stream=True)).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read()
        except OSError:
            pass  # a full queue, or the engine's end
    elif index % 4 == 1:
        server.post("/v1/completions", body(shared + own, n=2))
    else:
        server.post("/v1/completions", body(shared + own))
    if index % 8 == 3:
        server.post("/v1/completions", body("x", temperature=-1))
        server.post("/v1/completions", body("x") | {"model": "another"})
        server.post("/v1/completions", body("x" * 1000))
        server.get("/nowhere")


def start_clients(server: ServerProcess, count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=client, args=(server, index)) for index in range(count)]
    for thread in threads:
        thread.start()
    return threads


def run_clients(server: ServerProcess, count: int) -> None:
    for thread in start_clients(server, count):
        thread.join()


def load(server: ServerProcess) -> None:
    """Rounds of clients, until all has happened that the dashboards are for."""
    wanted = (
        *("num_preemptions_total", "recomputed_tokens_total", "prefix_cache_hits_total", "kv_blocks_evicted_total"),
        *('prefix_cache_misses_total{reason="evicted"}', 'admission_rejections_total{reason="queue_full"}'),
    )

    def missing() -> list[str]:
        _, text = server.get("/metrics")
        return [name for name in wanted if not has_happened(text, name)]

    for _ in range(20):
        run_clients(server, 16)
        if not missing():
            return
    raise AssertionError(f"the load never led to {missing()}")


def has_happened(text: str, name: str) -> bool:
    """Whether a counter of /metrics is above zero; `name` may bear one label."""
    name, _, label = name.rstrip("}").partition("{")
    samples = re.findall(rf"^octavo:{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    assert samples, f"no metric {name}"
    return any(float(value) > 0 for labels, value in samples if label in labels)


def kill_engine_under_load(server: ServerProcess) -> None:
    """Those under way end with an error, those that come meanwhile with 503; then another engine serves."""
    threads = start_clients(server, 8)
    wait_until(lambda: server.metric("num_requests_running") > 0, "a request runs")
    os.kill(server.engine_pid(), signal.SIGKILL)
    for thread in threads:
        thread.join()
    server.post("/v1/completions", body("too early"))
    wait_until(lambda: server.get("/ready")[0] == 200, "another engine serves")


def without_data(prometheus: Prometheus, expressions: list[Expression]) -> list[Expression]:
    return [item for item in expressions if not prometheus.values(item.expr)]


def test_every_expression_finds_data(prometheus: Prometheus, subtests: pytest.Subtests) -> None:
    """One test for all, since the load before it takes most of the time."""
    with subtests.test("every panel shows data"):
        assert len(panel_expressions()) > 60
        assert not without_data(prometheus, panel_expressions())

    with subtests.test("every alert has what it compares"):
        # A comparison leaves out what does not satisfy it, so an alert that is silent has no data, and should not.
        # Made to answer 0 or 1 instead (`bool`), each must find its series, on both sides of an `and` too.
        bare = [Expression(rule["alert"], COMPARISON.sub(r"\1 bool ", rule["expr"])) for rule in rules("alert")]
        assert all("bool" in item.expr for item in bare)
        assert not without_data(prometheus, bare)

    with subtests.test("every recording rule records"):
        assert not without_data(prometheus, [Expression("recorded", rule["record"]) for rule in rules("record")])

    with subtests.test("every selector finds a series"):
        # Also those that an `or` could do without: a misspelt name or label value finds nothing.
        found = selectors()
        assert len(found) > 50
        assert not without_data(prometheus, found)


def selectors() -> list[Expression]:
    """Everything that is looked up by name and labels, in panels, annotations and rules."""
    expressions = panel_expressions() + annotation_expressions()
    expressions += [Expression(rule.get("alert", "recorded"), rule["expr"]) for rule in RULES]
    by_text = {text: item.where for item in expressions for text in SELECTOR.findall(item.expr)}
    return [Expression(where, text) for text, where in by_text.items()]
