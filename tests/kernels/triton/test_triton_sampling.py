"""Draws on the device under the interpreter, against the sampler of the model room, token by token."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kernels.backend import DrawParameters
from octavo.kernels.triton.sampling import draw, penalise
from octavo.model.random import GumbelNoise
from octavo.model.truncation import Truncation, draw_truncated
from octavo.scheduler.sampling_params import SamplingParams

CPU = torch.device("cpu")
VOCAB = 5003  # two tiles and a bit, and prime


def parameters(params: list[SamplingParams], seeds: list[int]) -> DrawParameters:
    return DrawParameters(
        temperatures=torch.tensor([p.temperature for p in params]),
        top_ks=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_ps=torch.tensor([p.top_p for p in params]),
        min_ps=torch.tensor([p.min_p for p in params]),
        seeds=torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds]),
    )


def expected(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> int:
    if params.greedy:
        return int(logits.argmax())
    noise = GumbelNoise(logits.shape[-1], CPU)
    keys = noise.row_keys([seed], [position])
    scaled = (logits / params.temperature)[None]
    if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
        return int(draw_truncated(scaled, Truncation.of([params], logits.shape[-1], CPU), noise, keys))
    return int((scaled + noise.all_tokens(keys)).argmax())


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 400, VOCAB]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.2]),
)


@settings(max_examples=5, deadline=None)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=3),
    seed=st.integers(0, 2**64 - 5),
    position=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 3.0, 20.0]),
)
def test_every_row_draws_what_the_reference_sampler_draws(
    params: list[SamplingParams], seed: int, position: int, spread: float
) -> None:
    logits = torch.randn(len(params), VOCAB, generator=torch.Generator().manual_seed(seed % 2**31)) * spread
    seeds = [seed + index for index in range(len(params))]
    positions = [position + 3 * index for index in range(len(params))]
    drawn = draw(logits, parameters(params, seeds), torch.tensor(positions), truncated=True)
    assert drawn.tolist() == [expected(row, *rest) for row, *rest in zip(logits, params, seeds, positions, strict=True)]


def test_the_lowest_of_equal_logits_wins_across_tiles() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 4100]] = 3.0
    params = [SamplingParams(temperature=0.0)] * 2
    drawn = draw(logits, parameters(params, [0, 0]), torch.tensor([0, 0]), truncated=False)
    assert drawn.tolist() == [7, 0]


def test_tokens_of_equal_logits_stay_together() -> None:
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, [3, 900, 4500]] = 2.0
    params = SamplingParams(temperature=1.0, top_k=1)
    drawn = {int(draw(logits, parameters([params], [seed]), torch.tensor([0]), truncated=True)) for seed in range(12)}
    assert drawn == {3, 900, 4500}


def test_a_row_with_nan_is_marked_and_its_neighbour_is_not() -> None:
    logits = torch.randn(2, VOCAB)
    logits[0, 4999] = math.nan
    params = [SamplingParams(temperature=1.0, top_p=0.9)] * 2
    first, second = draw(logits, parameters(params, [1, 2]), torch.tensor([3, 4]), truncated=True).tolist()
    assert first == -1
    assert second == expected(logits[1], params[1], 2, 4)


def test_a_vocabulary_smaller_than_a_tile() -> None:
    logits = torch.randn(3, 50)
    params = [SamplingParams(temperature=t, top_k=k) for t, k in ((0.0, 0), (1.0, 0), (1.0, 3))]
    drawn = draw(logits, parameters(params, [5, 6, 7]), torch.tensor([1, 2, 3]), truncated=True)
    assert drawn.tolist() == [
        expected(row, *rest) for row, *rest in zip(logits, params, [5, 6, 7], [1, 2, 3], strict=True)
    ]


def test_penalties_from_counts() -> None:
    torch.manual_seed(3)
    logits = torch.randn(3, VOCAB)
    counts = torch.randint(0, 3, (2, VOCAB), dtype=torch.int32)
    in_prompt = torch.rand(2, VOCAB) < 0.3
    penalties = torch.tensor([[1.3, 1.0, 1.1], [0.5, 0.0, 0.0], [0.2, 0.0, -0.4]])
    found = penalise(logits, torch.tensor([1, -1, 0], dtype=torch.int32), counts, in_prompt, penalties)
    for row, slot in ((0, 1), (2, 0)):
        repetition, frequency, presence = penalties[:, row]
        seen = in_prompt[slot] | (counts[slot] > 0)
        x = torch.where(
            seen, torch.where(logits[row] > 0, logits[row] / repetition, logits[row] * repetition), logits[row]
        )
        x = x - counts[slot] * frequency - (counts[slot] > 0) * presence
        torch.testing.assert_close(found[row], x)
    assert torch.equal(found[1], logits[1])
