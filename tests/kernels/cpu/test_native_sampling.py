"""Native draws against the sampler of the model room, token by token."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kernels.backend import DrawParameters
from octavo.kernels.cpu.backend import CpuBackend
from octavo.model.random import GumbelNoise
from octavo.model.sampler import Sampler
from octavo.model.truncation import Truncation, draw_truncated
from octavo.scheduler.batch import ScheduledRow
from octavo.scheduler.sampling_params import SamplingParams

CPU = torch.device("cpu")
VOCAB = 5003  # prime: the last vector is never full
BACKEND = CpuBackend(CPU, torch.float32, 2)


def draw(logits: torch.Tensor, params: list[SamplingParams], seeds: list[int], positions: list[int]) -> list[int]:
    parameters = DrawParameters(
        temperatures=torch.tensor([p.temperature for p in params]),
        top_ks=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_ps=torch.tensor([p.top_p for p in params]),
        min_ps=torch.tensor([p.min_p for p in params]),
        seeds=torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds]),
    )
    return BACKEND.draw(logits, parameters, torch.tensor(positions)).tolist()


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


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=5),
    seed=st.integers(0, 2**64 - 6),
    position=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 3.0, 20.0]),
)
def test_every_row_draws_what_the_model_rooms_sampler_draws(
    params: list[SamplingParams], seed: int, position: int, spread: float
) -> None:
    logits = torch.randn(len(params), VOCAB, generator=torch.Generator().manual_seed(seed % 2**31)) * spread
    seeds = [seed + index for index in range(len(params))]
    positions = [position + 3 * index for index in range(len(params))]
    drawn = draw(logits, params, seeds, positions)
    assert drawn == [expected(row, *rest) for row, *rest in zip(logits, params, seeds, positions, strict=True)]
    alone = [draw(logits[i : i + 1], [params[i]], [seeds[i]], [positions[i]])[0] for i in range(len(params))]
    assert drawn == alone


def test_the_lowest_of_equal_logits_wins() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 4100]] = 3.0
    logits[1, VOCAB - 1] = 1.0
    greedy = [SamplingParams(temperature=0.0)] * 2
    assert draw(logits, greedy, [0, 0], [0, 0]) == [7, VOCAB - 1]


def test_a_row_with_a_nan_draws_nothing_and_spoils_no_other() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0)]
    clean = draw(logits, params, [1, 2, 3], [4, 5, 6])
    logits[1, VOCAB - 1] = float("nan")
    assert draw(logits, params, [1, 2, 3], [4, 5, 6]) == [clean[0], -1, clean[2]]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, 1234] = -50.0
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=0.7, top_p=0.9, top_k=5)):
        assert draw(logits, [params], [9], [9]) == [1234]


def test_frequencies_follow_the_probabilities() -> None:
    """Of a truncated distribution: a chi-square statistic far below what a wrong one would give."""
    logits = torch.full((1, VOCAB), -30.0)
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
    logits[0, :5] = weights.log()
    count = 4000
    params = [SamplingParams(temperature=1.0, top_k=4)] * count
    drawn = draw(logits.expand(count, VOCAB).contiguous(), params, list(range(count)), [17] * count)
    observed = torch.bincount(torch.tensor(drawn), minlength=5)[:5].double()
    assert observed[4] == 0
    ideal = weights[:4].double() / 15 * count
    assert ((observed[:4] - ideal) ** 2 / ideal).sum() < 16.3  # 0.1 % of three degrees of freedom


def test_a_sampler_draws_for_the_rows_it_is_given_whatever_the_step_before_had() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)).expand(2, -1) * 2
    hot, cold = SamplingParams(temperature=2.5), SamplingParams(temperature=0.0)
    sampler = Sampler(VOCAB, CPU, BACKEND)
    steps = [((hot, 1), (cold, 2)), ((hot, 1), (cold, 2)), ((cold, 2), (hot, 1)), ((hot, 3), (hot, 1)), ((hot, 1),)]
    for position, step in enumerate(steps, start=1):
        rows = [
            ScheduledRow(str(seed), [0] * position, 1, position - 1, 1, ([1],), params, seed) for params, seed in step
        ]
        drawn = [sampled.token_ids[0] for sampled in sampler.sample(logits[: len(rows)], rows).rows()]
        assert drawn == [expected(logits[0], params, seed, position) for params, seed in step]
