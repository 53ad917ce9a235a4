"""How often each kernel would be compiled while serving: once for a model, whatever batches bring.

Triton compiles a kernel anew where an integer argument is 1 or becomes a multiple of 16, and where a tensor begins at
another alignment: a pause of a second in the middle of somebody's answer. What it would compile can be asked for
without a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import generate
from octavo.kernels.backend import MoeSpec
from octavo.kernels.triton.moe import DenseExperts, moe
from octavo.kernels.triton.quantized import matmul_config, quantized_matmul
from octavo.kernels.triton.quantized_layout import pack
from octavo.kernels.triton.sampling import penalise
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.engine.messages import GenerateRequest
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as TransformersLlama
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import interpreter, jit

Variants = dict[str, dict[str, set[str]]]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Variants:
    """Kernel → its compile-time arguments → what it would be compiled for. Nothing is run: new memory is zeros."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[Any, tuple[Any, Callable[..., Any]]] = {}
    found: Variants = defaultdict(lambda: defaultdict(set))

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self not in binders:
            kernel = jit.JITFunction(self.fn, **self.kwargs)
            binders[self] = kernel, jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        kernel, bind = binders[self]
        bound, specialisation, options = bind(*args, **kwargs)
        constants = [bound[param.name] for param in kernel.params if param.is_constexpr]
        found[self.fn.__name__][repr(constants)].add(f"{specialisation} {sorted(options.items(), key=str)}")

    zeros = torch.zeros
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: zeros(*args, **kwargs))
    return found


def assert_one_each(found: Variants) -> None:
    assert {kernel: len(s) for kernel, by in found.items() for s in by.values() if len(s) > 1} == {}


def test_a_server_compiles_each_kernel_once(variants: Variants, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
    )  # fmt: skip
    TransformersLlama(config).save_pretrained(tmp_path)
    requests = [
        GenerateRequest(
            request_id=f"r{index}",
            prompt_token_ids=[1 + i % 60 for i in range(length)],
            params=SamplingParams(
                temperature=index % 3 / 2, top_k=index % 5, max_tokens=2 + 3 * index, ignore_eos=True
            ),
        )
        for index, length in enumerate([1, 15, 16, 17, 600, 31, 5, 241, 33, 8, 64, 47, 2, 513, 90, 3, 1])
    ]
    generate(tmp_path, "triton", requests, max_model_len=1100, budget=256, per_step=2)
    assert variants.keys() >= {"decode_kernel", "join_kernel", "list_kernel", "prefill_kernel", "rope_write_kernel"}
    assert variants.keys() >= {"rms_norm_kernel", "gated_kernel", "draw_kernel", "pick_kernel", "threshold_kernel"}
    assert_one_each(variants)


class BlankWeight:
    """A StoredWeight of zeros."""

    name = "blank"
    encoding = "Q4_0"
    shape = (256, 256)

    def raw(self) -> torch.Tensor:
        return torch.zeros(256, 256 // 32 * 18, dtype=torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=dtype)


def test_products_and_penalties_are_the_same_for_any_number_of_rows(variants: Variants) -> None:
    matrix = pack([BlankWeight()], torch.device("cpu"))
    for num_rows in (1, 2, 15, 16, 17, 32, 33, 64):
        x, out = torch.zeros(num_rows, 256).half(), torch.zeros(num_rows, 256).half()
        quantized_matmul(x, matrix, None, out, matmul_config(x.dtype))
        slots, counts = torch.zeros(num_rows, dtype=torch.int32), torch.zeros(2, 100, dtype=torch.int32)
        penalise(torch.zeros(num_rows, 100), slots, counts, counts > 0, torch.zeros(3, num_rows))
    assert len(variants["matmul_kernel"]) == 2  # tiles of 16 rows and of 32
    assert_one_each(variants)


def test_experts_are_the_same_for_any_number_of_tokens(variants: Variants) -> None:
    spec = MoeSpec(num_experts=8, num_experts_per_token=2, renormalize=True, activation="silu")
    experts = DenseExperts(torch.zeros(8, 96, 64).half(), torch.zeros(8, 64, 48).half())
    for num_tokens in (1, 2, 15, 16, 64, 65, 100, 1024):
        moe(torch.zeros(num_tokens, 64).half(), torch.zeros(num_tokens, 8).half(), experts, spec)
    # The way in and the way out, in tiles of 16 rows and of 64.
    assert len(variants["experts_kernel"]) == 4
    assert_one_each(variants)
