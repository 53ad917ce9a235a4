"""Mixtral (Jiang et al. 2024): Mistral with experts in every layer, under names of its own."""

from __future__ import annotations

from ..moe import ExpertNames
from .decoder import Decoder


class MixtralForCausalLM(Decoder):
    expert_names = ExpertNames(module="block_sparse_moe", gate="w1", up="w3", down="w2")
