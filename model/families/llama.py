"""Llama (Touvron et al. 2023) and everything of its shape: SmolLM2, TinyLlama, Llama 2 and 3.

Mistral (Jiang et al. 2023) adds a window to all layers or to none, Qwen2 (Yang et al. 2024) biases on queries, keys and
values, and Granite (IBM 2024) four factors; the spec says all of that, and the shared layers do it.
"""

from __future__ import annotations

from .decoder import Decoder


class LlamaForCausalLM(Decoder):
    """Blocks as `Decoder` makes them."""
