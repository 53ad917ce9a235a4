"""`octavo serve --load-format dummy`: a config.json and a tokenizer are all that a server needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.llm import LLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def write_model(directory: Path) -> None:
    """A tokenizer of 256 bytes, one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(CONFIG))


def test_a_config_and_a_tokenizer_are_served(tmp_path: Path, start_server: Callable[..., Any]) -> None:
    write_model(tmp_path)
    server = start_server("--model", str(tmp_path), "--load-format", "dummy", "--dtype", "float32")
    # There is no chat template, so what to try is a completion.
    server.wait_for_line("/v1/completions -H")
    body = {"model": tmp_path.name, "prompt": "twelve bytes", "max_tokens": 8, "temperature": 0}
    answers = [server.post("/v1/completions", body) for _ in range(2)]
    assert [status for status, _ in answers] == [200, 200]
    assert answers[0][1]["usage"] == {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20} | {
        key: value for key, value in answers[0][1]["usage"].items() if key.endswith("details")
    }
    assert answers[0][1]["choices"] == answers[1][1]["choices"]
    assert server.stop() == 0


def test_the_offline_class_takes_them_too(tmp_path: Path) -> None:
    write_model(tmp_path)
    llm = LLM(str(tmp_path), load_format="dummy", kernel_backend="reference", dtype="float32", kv_cache_memory=2**24)
    (first,) = llm.generate("twelve bytes", SamplingParams(temperature=0, max_tokens=5), progress=False)
    assert len(first.completions[0].token_ids) == 5
    assert llm.ready.backend == "reference"
