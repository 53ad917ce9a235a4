"""transformers' greedy tokens as an oracle, for tests that compare an engine with them.

Both sides run the same dequantised weights in fp32. Where they part, the two best logits must be a near-tie (rounding
decides); a sequence is compared up to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from octavo.model.weights.source import WeightSource

NEAR_TIE = 5e-3
"""Logits are of order 20 here, and summed in fp32 in another order."""

STORY = (
    "In the spring of 1912 a clockmaker named Ansel Brandt left the town of Kirchheim with two trunks, a violin that "
    "he could not play, and a letter he had promised never to open. The road to the coast was longer than the map "
    "allowed, and by the third evening he had traded the violin for a pair of boots and the company of a dog. He asked "
    "every innkeeper the same three questions: how far is the sea, who winds the church clock, and what do you do "
    "with a promise that nobody remembers? Most of them laughed. One of them, a woman who kept bees behind the stable, "
    "answered all three without looking up from her work. "
)


@dataclass
class Reference:
    prompt: list[int]
    tokens: list[int]
    gaps: list[float]
    """Distance between the best and the second best logit at each output token."""


def references_of(model: Any, source: WeightSource, prompts: Sequence[list[int]], num_tokens: int) -> list[Reference]:
    """`model` is transformers', with any weights: those of `source` take their place."""
    state = {name: source.weight(name).dequantize(torch.float32) for name in source.names()}
    missing, unexpected = model.eval().load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    references = []
    for prompt in prompts:
        with torch.inference_mode():
            result = model.generate(
                torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None,
                pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        gaps = [float(values[0] - values[1]) for values in (step[0].topk(2).values for step in result.logits)]
        references.append(Reference(prompt, result.sequences[0, len(prompt) :].tolist(), gaps))
    return references


def assert_equal_but_for_near_ties(references: Sequence[Reference], answers: Sequence[list[int]], most: int) -> None:
    """At most `most` of the sequences part."""
    num_parted = 0
    for reference, tokens in zip(references, answers, strict=True):
        assert len(tokens) == len(reference.tokens)
        for position, (ours, theirs) in enumerate(zip(tokens, reference.tokens, strict=True)):
            if ours != theirs:
                assert reference.gaps[position] < NEAR_TIE, f"token {position} differs, and not by a near-tie"
                num_parted += 1
                break
    assert num_parted <= most
