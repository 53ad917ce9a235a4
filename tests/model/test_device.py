"""Which device and dtype are taken, and what is said of those that are not there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from octavo.kernels.cpu.library import supported_isas
from octavo.model import device as device_module
from octavo.model.device import resolve_device, resolve_dtype
from octavo.model.spec import ModelError
from small_spec import SPEC

CPU = torch.device("cpu")


def test_auto_takes_cuda_where_torch_finds_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    assert resolve_device("cpu") == CPU


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="use device cpu or auto"):
        resolve_device("cuda")
    with pytest.raises(ModelError, match="unknown device 'tpu'"):
        resolve_device("tpu")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx2"}, torch.float32),
        ({"avx2", "avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
        (set(), torch.float32),
    ],
)
def test_auto_dtype_of_plain_torch_follows_the_instruction_sets(monkeypatch, flags, dtype):
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: frozenset(flags))
    assert resolve_dtype("auto", CPU, "reference", SPEC) is dtype


@pytest.mark.skipif(not supported_isas(), reason="no native library for this machine")
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"head_dim": 20}, torch.float32),  # plain torch computes it
        ({"transformers_config": "{}"}, torch.float32),  # transformers' code computes it
    ],
)
def test_auto_dtype_is_bfloat16_where_native_kernels_compute_the_model(monkeypatch, changes, dtype):
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: frozenset({"avx2"}))
    assert resolve_dtype("auto", CPU, "auto", dataclasses.replace(SPEC, **changes)) is dtype


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_dtype_on_cuda(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda"), "auto", SPEC) is dtype


def test_named_dtypes():
    assert resolve_dtype("float16", CPU, "auto", SPEC) is torch.float16
    with pytest.raises(ModelError, match="unknown dtype 'int3'"):
        resolve_dtype("int3", CPU, "auto", SPEC)


def test_float16_runs_on_the_cpu(tiny_model, make_batch):
    model = tiny_model(dtype="float16", initializer_range=0.05)
    sequence = model.sequence(30)
    logits = model.runner.forward_logits(make_batch(prefill=[sequence.row()])).float()
    expected = model.logits(sequence.token_ids)[-1:]
    torch.testing.assert_close(logits.softmax(-1), expected.softmax(-1), rtol=0.05, atol=1e-3)
