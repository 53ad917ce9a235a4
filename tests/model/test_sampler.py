"""Every sampling parameter acts, and a seeded draw depends on nothing but its seed, position and logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.model.random import GumbelNoise, _to_gumbel
from octavo.model.sampler import Sampler, first_maximum
from octavo.scheduler.batch import ScheduledRow
from octavo.scheduler.sampling_params import SamplingParams

CPU = torch.device("cpu")
VOCAB = 4992  # more than truncation looks at before it sorts everything


def row(
    params: SamplingParams,
    *,
    seq_id: str = "a",
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (),
    seed: int = 0,
    eos: tuple[int, ...] = (),
) -> ScheduledRow:
    tokens = [*prompt, *output]
    return ScheduledRow(seq_id, tokens, len(prompt), len(tokens) - 1, 1, ([1],), params, seed, eos)


def draw(logits: torch.Tensor, *rows: ScheduledRow, sampler: Sampler | None = None) -> list[int]:
    sampler = sampler or Sampler(logits.shape[1], CPU)
    return [sampled.token_ids[0] for sampled in sampler.sample(logits, rows).rows()]


def random_logits(count: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def many_draws(logits: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    """Frequencies of the tokens over seeds 0 to count, from one row of logits. [vocab]"""
    sampler = Sampler(logits.numel(), CPU)
    drawn: list[int] = []
    for start in range(0, count, 500):
        rows = [row(params, seq_id=str(seed), seed=seed) for seed in range(start, min(start + 500, count))]
        drawn += draw(logits.expand(len(rows), -1), *rows, sampler=sampler)
    return torch.bincount(torch.tensor(drawn), minlength=logits.numel())


def chi_square_fits(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Whether the statistic lies within five standard deviations of its mean; cells below 8 expected are merged."""
    total = int(counts.sum())
    large = probabilities * total >= 8
    observed = torch.cat((counts[large].double(), counts[~large].sum().double()[None]))
    expected = torch.cat((probabilities[large].double(), probabilities[~large].sum().double()[None])) * total
    cells = expected > 0
    assert observed[~cells].sum() == 0, "a token of probability 0 was drawn"
    statistic = float(((observed[cells] - expected[cells]) ** 2 / expected[cells]).sum())
    freedom = int(cells.sum()) - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom) + 5


def test_greedy_takes_the_lowest_id_on_ties():
    logits = torch.zeros(2, 50)
    logits[0, [7, 30]] = 2.0
    assert draw(logits, row(SamplingParams(temperature=0)), row(SamplingParams(temperature=0))) == [7, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_plain_draws_follow_the_softmax(temperature):
    logits = random_logits(1, vocab=40, scale=1.5)
    counts = many_draws(logits, SamplingParams(temperature=temperature), 6000)
    assert chi_square_fits(counts, (logits[0] / temperature).softmax(-1))


def test_consecutive_positions_of_one_seed_are_independent_draws():
    logits = random_logits(1, vocab=30, scale=1.0).expand(3000, -1)
    rows = [row(SamplingParams(), prompt=[0] * (n + 1), seed=9) for n in range(3000)]
    drawn = torch.tensor(draw(logits, *rows))
    probabilities = logits[0].softmax(-1)
    assert chi_square_fits(torch.bincount(drawn, minlength=30), probabilities)
    pairs = torch.bincount(drawn[:-1] * 30 + drawn[1:], minlength=900)
    assert chi_square_fits(pairs, torch.outer(probabilities, probabilities).view(-1))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(top_k=20, top_p=0.8, min_p=0.05, temperature=1.3),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-6),
    ],
)
# With 0.02 the distribution is so flat that the first candidates do not suffice.
@pytest.mark.parametrize(("scale", "num_draws"), [(2.0, 1500), (0.02, 300)])
def test_truncated_draws_follow_the_truncated_distribution(params, scale, num_draws):
    logits = random_logits(1, scale=scale)
    counts = many_draws(logits, params, num_draws)
    assert chi_square_fits(counts, slow_distribution(logits[0], params))


def slow_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, min_p, top_k, top_p by full sorts, as vLLM orders them; fp64 [vocab]."""
    x = logits.double() / params.temperature
    probabilities = x.softmax(-1)
    x[probabilities < params.min_p * probabilities.max()] = -math.inf
    if params.top_k > 0:
        kept = x.sort(descending=True, stable=True).indices[: params.top_k]
        x = torch.full_like(x, -math.inf).index_copy(0, kept, x[kept])
    order = x.sort(descending=True, stable=True).indices
    sorted_probabilities = x.softmax(-1)[order]
    before = sorted_probabilities.cumsum(-1) - sorted_probabilities
    if params.top_p < 1:
        x[order[1:][before[1:] >= params.top_p]] = -math.inf
    return x.softmax(-1)


@given(
    top_k=st.sampled_from([0, 1, 3, 100, 256, 257, 1000, 4096, 4097, 10**6]),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    temperature=st.floats(0.1, 3.0),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=120, deadline=None)
def test_truncation_finds_the_arg_max_of_noise_over_the_kept_tokens(top_k, top_p, min_p, temperature, scale, seed):
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    logits = random_logits(1, scale=scale, seed=seed % 1000)
    noise = GumbelNoise(VOCAB, CPU)
    perturbed = logits / temperature + noise.all_tokens(noise.row_keys([seed], [3]))
    drawn = draw(logits, row(params, seed=seed))[0]
    # Rounding may move the border by a token either way.
    loose = SamplingParams(top_k=top_k, top_p=min(1.0, top_p + 1e-4), min_p=min_p * (1 - 1e-5), temperature=temperature)
    tight = SamplingParams(
        top_k=top_k, top_p=max(1e-9, top_p - 1e-4), min_p=min(1.0, min_p * (1 + 1e-5)), temperature=temperature
    )
    certain, possible = (slow_distribution(logits[0], variant) > 0 for variant in (tight, loose))
    assert possible[drawn]
    assert perturbed[0, drawn] >= perturbed[0].masked_fill(~certain, -math.inf).max()


def test_a_seeded_draw_ignores_the_rest_of_the_batch():
    kinds = [
        SamplingParams(),
        SamplingParams(top_k=40, top_p=0.9),
        SamplingParams(temperature=0),
        SamplingParams(frequency_penalty=0.5),
        SamplingParams(min_p=0.01),
    ]
    logits = random_logits(60, scale=2.0)
    rows = [row(kinds[i % 5], seq_id=str(i), seed=i * 7919 - 2**40, output=[i] * (i % 7)) for i in range(60)]
    together = draw(logits, *rows)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    assert draw(logits[order], *(rows[i] for i in order)) == [together[i] for i in order]
    assert [draw(logits[i : i + 1], rows[i])[0] for i in range(60)] == together


def test_seed_and_position_both_matter():
    logits = torch.zeros(1, VOCAB)
    draws = {
        (seed, n): draw(logits, row(SamplingParams(), seed=seed, prompt=[0] * n))[0]
        for seed in (1, 2, -1, 2**63)
        for n in (1, 2, 3)
    }
    assert len(set(draws.values())) > 10


def test_noise_is_the_same_for_a_token_wherever_it_is_asked_for():
    noise = GumbelNoise(VOCAB, CPU)
    keys = noise.row_keys([1, 2], [10, 10])
    ids = torch.tensor([[5, VOCAB - 1, 0], [7, 7, 3]])
    assert torch.equal(noise.for_tokens(keys, ids), noise.all_tokens(keys).gather(1, ids))


def test_noise_is_standard_gumbel():
    noise = GumbelNoise(50000, CPU)
    values = noise.all_tokens(noise.row_keys(list(range(20)), [4] * 20)).double()
    assert values.isfinite().all()
    assert abs(float(values.mean()) - 0.5772157) < 0.005
    assert abs(float(values.var()) - math.pi**2 / 6) < 0.02
    correlation = torch.corrcoef(values)
    assert float((correlation - torch.eye(20)).abs().max()) < 0.03


def test_noise_is_finite_for_all_bits():
    """The uppermost bits round to 1 as a float; −log(−log(1 − 1)) would be −inf."""
    noise = GumbelNoise(4, CPU)
    bits = torch.tensor([[0, 1, 2**30, 2**31 - 65, 2**31 - 64, 2**31 - 1]], dtype=torch.int32)
    values = _to_gumbel(bits.clone())
    assert values.isfinite().all()
    assert (values.diff() <= 0).all()
    exact = -(-(1 - (bits[0, :3].double() + 0.5) / 2**31).log()).log()
    torch.testing.assert_close(values[0, :3].double(), exact, rtol=1e-5, atol=1e-5)
    assert noise.all_tokens(noise.row_keys([1], [1])).isfinite().all()


def test_edits_follow_their_sequences_over_steps_and_in_any_batch():
    sampler, vocab = Sampler(60, CPU), 60
    rows = [
        row(SamplingParams(temperature=0, logit_bias={i: 50.0 + i, 59: 1.0}), seq_id=str(i), eos=(2,)) for i in range(6)
    ]
    waiting = SamplingParams(temperature=0, min_tokens=9, stop_token_ids=(7, 8, 999))
    rows += [row(waiting, seq_id=f"w{i}", eos=(i,)) for i in range(3)]
    logits = torch.zeros(1, vocab)
    logits[0, [0, 1, 2, 7, 8]] = torch.tensor([9.0, 8.0, 7.0, 10.0, 10.0])
    expected = [*range(6), 1, 0, 0]
    for order in ([*range(9)], [8, 3, 0, 6], [5], [7, 7, 1]):
        chosen = [rows[index] for index in order]
        assert draw(logits.expand(len(chosen), -1), *chosen, sampler=sampler) == [expected[i] for i in order]
    sampler.drop([r.seq_id for r in rows])
    assert not sampler._edits._entries
    again = row(SamplingParams(temperature=0, logit_bias={33: 99.0}), seq_id="0")
    assert draw(logits, again, sampler=sampler) == [33]
    other = row(SamplingParams(temperature=0, logit_bias={44: 99.0}), seq_id="0")
    assert draw(logits, other, sampler=sampler) == [44]


def test_logit_bias_forces_and_bans():
    logits = random_logits(2, vocab=50)
    best = int(logits[1].argmax())
    biased = SamplingParams(temperature=0, logit_bias={17: 100.0})
    banned = SamplingParams(temperature=0, logit_bias={best: -100.0})
    second = int(logits[1].topk(2).indices[1])
    assert draw(logits, row(biased), row(banned)) == [17, second]


def test_eos_and_stop_ids_wait_for_min_tokens():
    logits = torch.zeros(1, 50)
    logits[0, 4], logits[0, 5], logits[0, 6] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(5,))
    assert draw(logits, row(params, eos=(4, 10**6), output=[9])) == [6]
    assert draw(logits, row(params, eos=(4, 10**6), output=[9, 9])) == [4]


def slow_penalties(logits: list[float], sequence: ScheduledRow) -> list[float]:
    """The formulas of the OpenAI API and of CTRL, one token at a time."""
    params = sequence.params
    prompt = set(sequence.token_ids[: sequence.num_prompt_tokens])
    output = list(sequence.token_ids[sequence.num_prompt_tokens :])
    result = []
    for token, value in enumerate(logits):
        if token in prompt or token in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = output.count(token)
        result.append(value - params.frequency_penalty * count - params.presence_penalty * (count > 0))
    return result


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_penalties_equal_a_slow_oracle_over_many_steps(data):
    """Sequences grow, end, come back and shrink; the counts kept between steps must never show."""
    vocab = 12
    tokens = st.lists(st.integers(0, vocab - 1), max_size=6)
    penalty = st.sampled_from([-1.5, 0.0, 0.7])
    sampler = Sampler(vocab, CPU)
    sequences: dict[str, ScheduledRow] = {}
    for step in range(data.draw(st.integers(1, 6))):
        for seq_id in data.draw(st.sets(st.sampled_from("abcdefg"), min_size=1)):
            old = sequences.get(seq_id)
            if old is None or data.draw(st.integers(0, 5)) == 0:
                params = SamplingParams(
                    temperature=0,
                    presence_penalty=data.draw(penalty),
                    frequency_penalty=data.draw(penalty),
                    repetition_penalty=data.draw(st.sampled_from([0.5, 1.0, 1.7])),
                    logprobs=vocab,
                )
                prompt, output = [1, *data.draw(tokens)], data.draw(tokens)
                if old is not None:
                    sampler.drop([seq_id])
            else:
                params, prompt = old.params, list(old.token_ids[: old.num_prompt_tokens])
                output = [*old.token_ids[old.num_prompt_tokens :], *data.draw(tokens)]
            sequences[seq_id] = row(params, seq_id=seq_id, prompt=prompt, output=output)
        rows = list(sequences.values())
        logits = random_logits(len(rows), vocab=vocab, seed=step)
        for sampled, sequence, before in zip(sampler.sample(logits, rows).rows(), rows, logits.tolist(), strict=True):
            expected = torch.tensor(slow_penalties(before, sequence)).log_softmax(-1)
            assert sampled.logprobs is not None
            entry = sampled.logprobs[0]
            torch.testing.assert_close(
                torch.tensor(entry.logprobs), expected[torch.tensor(entry.token_ids)], rtol=1e-4, atol=1e-4
            )


def test_logprobs_are_those_before_temperature_and_truncation():
    logits = random_logits(3)
    rows = [
        row(SamplingParams(temperature=0.3, top_k=2, logprobs=4)),
        row(SamplingParams()),
        row(SamplingParams(temperature=0, logprobs=0)),
    ]
    first, second, third = Sampler(VOCAB, CPU).sample(logits, rows).rows()
    expected = logits.log_softmax(-1)
    assert second.logprobs is None
    assert first.logprobs is not None
    assert third.logprobs is not None
    assert first.logprobs[0].token_ids == [first.token_ids[0], *expected[0].topk(4).indices.tolist()]
    assert first.logprobs[0].logprobs == pytest.approx(expected[0][first.logprobs[0].token_ids].tolist(), abs=1e-5)
    assert third.logprobs[0].token_ids == third.token_ids
    assert third.logprobs[0].logprobs == pytest.approx([float(expected[2].max())], abs=1e-5)


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(min_p=0.1)]
)
@pytest.mark.parametrize("where", [slice(None), slice(3, 4)])
def test_nan_logits_are_an_error_and_never_a_token(params, where):
    logits = random_logits(2)
    logits[1, where] = float("nan")
    with pytest.raises(FloatingPointError, match="the model produced NaN logits"):
        draw(logits, row(params), row(params))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_first_maximum_is_arg_max_with_ties_and_nans(data):
    width = data.draw(st.sampled_from([64, 192, 100, 1]))
    rows = data.draw(st.integers(1, 4))
    values = st.sampled_from([0.0, 1.0, -math.inf, 2.0] + [math.nan] * data.draw(st.integers(0, 1)))
    x = torch.zeros(rows, width)
    for _ in range(data.draw(st.integers(0, 8))):
        x[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, width - 1))] = data.draw(values)
    assert first_maximum(x).tolist() == x.argmax(-1).tolist()
    assert first_maximum(x.expand(rows, -1)[:, :width].to(torch.bfloat16)).tolist() == x.argmax(-1).tolist()


def test_the_logits_given_are_left_alone():
    logits = random_logits(2)
    before = logits.clone()
    draw(logits, row(SamplingParams(presence_penalty=1, logit_bias={3: 5.0})), row(SamplingParams(top_p=0.5)))
    assert torch.equal(logits, before)


def test_bfloat16_logits_are_drawn_from_in_fp32():
    logits = random_logits(1, vocab=40, scale=1.0).to(torch.bfloat16)
    counts = many_draws(logits, SamplingParams(temperature=0.7), 4000)
    assert chi_square_fits(counts, (logits[0].float() / 0.7).softmax(-1))
