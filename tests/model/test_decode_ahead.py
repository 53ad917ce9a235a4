"""Which rows of a decode step are drawn once more, around a step that computes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from octavo.kernels.backend import AttentionSpec
from octavo.model.decode_ahead import DecodeAhead
from octavo.model.layer_groups import LayerGroup
from octavo.model.sampler import Sampler
from octavo.scheduler.batch import ScheduledBatch, ScheduledRow
from octavo.scheduler.sampling_params import SamplingParams

VOCAB = 16
GREEDY = SamplingParams(temperature=0.0)


class WatchedSampler(Sampler):
    """Greedy on torch; notes how many rows it is given."""

    def __init__(self) -> None:
        super().__init__(VOCAB, torch.device("cpu"))
        self.num_rows: list[int] = []

    def sample(self, logits: torch.Tensor, rows: Any) -> Any:
        assert logits.shape == (len(rows), VOCAB)
        self.num_rows.append(len(rows))
        return super().sample(logits, rows)


@pytest.fixture
def sampler() -> WatchedSampler:
    return WatchedSampler()


@pytest.fixture
def ahead(sampler: WatchedSampler) -> DecodeAhead:
    """The captured step leaves the logits of row r at their highest for token r, and draws token 10 + r."""
    model: Any = SimpleNamespace(layer_groups=(LayerGroup(AttentionSpec(1, 1, 1, scale=1.0), (0,)),))
    backend: Any = SimpleNamespace(dtype=torch.float32, decode_workspace=lambda *_: None)
    kv_layers = [torch.zeros(1, 2, 1, 16, 1)]
    ahead = DecodeAhead(model, backend, sampler, kv_layers, max_num_seqs=4, max_model_len=64, vocab_size=VOCAB)

    def run(shape: object) -> None:
        ahead._graphs.step.logits(4).copy_(torch.eye(4, VOCAB))
        ahead._drawn.copy_(torch.arange(10, 14))

    ahead._graphs.run = run  # type: ignore[method-assign]
    return ahead


def rows(*params: SamplingParams, unknown: int = 0) -> list[ScheduledRow]:
    return [
        ScheduledRow(f"r{index}", [1] * (4 - unknown), 2, 3, 1, ([1],), one, 0, (), unknown)
        for index, one in enumerate(params)
    ]


def test_only_the_rows_that_ask_for_more_are_drawn_again(ahead: DecodeAhead, sampler: WatchedSampler) -> None:
    asking = SamplingParams(temperature=0.0, logprobs=2)
    drawn = ahead.launch(rows(GREEDY, asking, GREEDY, SamplingParams(temperature=0.0, logit_bias={7: 5.0})))
    assert sampler.num_rows == [2]
    found = drawn.rows()
    assert [row.token_ids for row in found] == [[10], [1], [12], [7]]
    assert [row.seq_id for row in found] == ["r0", "r1", "r2", "r3"]
    assert [row.logprobs is not None for row in found] == [False, True, False, False]
    assert found[1].logprobs is not None
    assert found[1].logprobs[0].token_ids[0] == 1


def test_the_next_step_finds_what_was_drawn_again(ahead: DecodeAhead) -> None:
    ahead.launch(rows(GREEDY, SamplingParams(temperature=0.0, logprobs=0)))
    tokens = torch.zeros(2, dtype=torch.int64)
    ahead.fill_in(tokens, ScheduledBatch(rows(GREEDY, GREEDY, unknown=1), 2))
    assert tokens.tolist() == [10, 1]


def test_a_batch_that_asks_for_nothing_is_not_drawn_again(ahead: DecodeAhead, sampler: WatchedSampler) -> None:
    over = SamplingParams(temperature=0.0, min_tokens=1)  # of which the row has two
    assert [row.token_ids for row in ahead.launch(rows(GREEDY, over)).rows()] == [[10], [11]]
    assert sampler.num_rows == []


def test_another_sequence_under_the_same_id_asks_for_itself(ahead: DecodeAhead, sampler: WatchedSampler) -> None:
    ahead.launch(rows(SamplingParams(temperature=0.0, logprobs=0)))
    ahead.launch(rows(GREEDY))
    ahead.launch(rows(SamplingParams(temperature=0.0, logprobs=0)))
    assert sampler.num_rows == [1, 1]


def test_it_takes_decodes_that_reach_their_newest_token_only(ahead: DecodeAhead) -> None:
    inside = ScheduledRow("r9", [1] * 9, 9, 3, 1, ([1],), GREEDY, 0)  # one token of a prompt
    assert ahead.takes(ScheduledBatch(rows(GREEDY, GREEDY), 2))
    assert ahead.takes(ScheduledBatch(rows(GREEDY, unknown=1), 1))
    assert not ahead.takes(ScheduledBatch([*rows(GREEDY), inside], 2))
    assert not ahead.takes(ScheduledBatch(rows(GREEDY), 0))
