"""The whole forward pass against transformers, in every shape a step may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from octavo.scheduler.batch import BlockCopy, ScheduledBatch

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24},
    "mqa": {"num_key_value_heads": 1},
    "head_dim_64": {"head_dim": 64},
    "head_dim_80_untied": {"head_dim": 80, "tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def assert_logits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.float(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_steps_equal_transformers(tiny_model, make_batch, shape):
    model = tiny_model(**SHAPES[shape])
    old = [model.sequence(n) for n in (1, 40, 16, 17)]
    model.runner.execute(make_batch(prefill=[s.row() for s in old]))
    for sequence in old:
        sequence.token_ids.append(7)
    continued, fresh, partial = model.sequence(60), model.sequence(33), model.sequence(50)
    model.runner.execute(make_batch(prefill=[continued.row(37)]))
    logits = model.runner.forward_logits(
        make_batch([s.row() for s in old], [continued.row(), fresh.row(), partial.row(20)])
    )
    expected = [model.logits(s.token_ids)[-1] for s in (*old, continued, fresh)]
    assert_logits_equal(logits, torch.stack(expected))


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_chunked_prefill_then_decode(tiny_model, make_batch, block_size, chunk):
    model = tiny_model(block_size=block_size, num_blocks=24)
    sequence = model.sequence(100)
    while sequence.num_computed + chunk < 100:
        assert model.runner.execute(make_batch(prefill=[sequence.row(chunk)])).sampled == []
    logits = [model.runner.forward_logits(make_batch(prefill=[sequence.row()]))]
    for token in (5, 6, 9):
        sequence.token_ids.append(token)
        logits.append(model.runner.forward_logits(make_batch([sequence.row()])))
    assert_logits_equal(torch.cat(logits), model.logits(sequence.token_ids)[-4:])


def test_greedy_generation_equals_transformers(tiny_model, make_batch):
    model = tiny_model()
    sequences = [model.sequence(n) for n in (3, 90, 31, 48, 65, 12)]
    batch = make_batch(prefill=[s.row() for s in sequences])
    for _ in range(20):
        for sequence, sampled in zip(sequences, model.runner.execute(batch).sampled, strict=True):
            sequence.token_ids.extend(sampled.token_ids)
        batch = make_batch([s.row() for s in sequences])
    for sequence in sequences:
        expected = model.logits(sequence.token_ids)[sequence.num_prompt_tokens - 1 : -1].argmax(-1)
        assert sequence.token_ids[sequence.num_prompt_tokens :] == expected.tolist()


def test_skewed_lengths_and_many_rows(tiny_model, make_batch):
    """Enough rows of enough lengths that they fall into several groups, in neither order."""
    model = tiny_model(num_blocks=400, head_dim=64)
    lengths = [480, 1, 30, 200, 2, 3, 120, 460, 15, 16, 300, 64, 7, 90]
    sequences = [model.sequence(n) for n in lengths]
    prefill = model.runner.forward_logits(make_batch(prefill=[s.row() for s in sequences]))
    assert_logits_equal(prefill, torch.stack([model.logits(s.token_ids)[-1] for s in sequences]))
    for sequence in sequences:
        sequence.token_ids.append(11)
    decode = model.runner.forward_logits(make_batch([s.row() for s in sequences]))
    assert_logits_equal(decode, torch.stack([model.logits(s.token_ids)[-1] for s in sequences]))


def test_bfloat16_stays_close_to_transformers(tiny_model, make_batch):
    """Not bit for bit: the two round in different places. The distributions agree nevertheless."""
    model = tiny_model(dtype="bfloat16", initializer_range=0.05)
    sequences = [model.sequence(n) for n in (20, 70, 35)]
    model.runner.execute(make_batch(prefill=[s.row(10) for s in sequences]))
    logits = model.runner.forward_logits(make_batch(prefill=[s.row() for s in sequences])).float()
    expected = torch.stack([model.logits(s.token_ids)[-1] for s in sequences])
    torch.testing.assert_close(logits.softmax(-1), expected.softmax(-1), rtol=0.1, atol=2e-3)


def test_what_other_slots_hold_never_leaks(tiny_model, make_batch):
    """Poison everything, block 0 included, that no sequence has written."""
    model = tiny_model()
    (pool,) = model.runner.kv_pools
    for poison in (float("nan"), float("inf")):
        pool.fill_(poison)
        sequences = [model.sequence(n) for n in (3, 40, 17)]
        model.runner.execute(make_batch(prefill=[s.row(min(20, len(s.token_ids))) for s in sequences]))
        rest = [s for s in sequences if s.num_computed < len(s.token_ids)]
        model.runner.execute(make_batch(prefill=[s.row() for s in rest]))
        for sequence in sequences:
            sequence.token_ids.append(9)
        logits = model.runner.forward_logits(make_batch([s.row() for s in sequences]))
        assert_logits_equal(logits, torch.stack([model.logits(s.token_ids)[-1] for s in sequences]))


def test_a_nan_sequence_spares_its_neighbours(tiny_model, make_batch):
    model = tiny_model()
    sick, well, long = (model.sequence(n) for n in (20, 21, 60))
    model.runner.execute(make_batch(prefill=[s.row() for s in (sick, well, long)]))
    model.runner.kv_pools[0][:, sick.block_ids[0]] = float("nan")
    for sequence in (sick, well, long):
        sequence.token_ids.append(5)
    batch = make_batch([s.row() for s in (sick, well, long)])
    logits = model.runner.forward_logits(batch)
    assert logits[0].isnan().any()
    assert_logits_equal(logits[1:], torch.stack([model.logits(s.token_ids)[-1] for s in (well, long)]))
    with pytest.raises(FloatingPointError, match="the model produced NaN logits"):
        model.runner.execute(batch)
    assert len(model.runner.execute(batch.part(1, 3)).sampled) == 2


def test_copied_blocks_serve_a_second_sequence(tiny_model, make_batch):
    model = tiny_model()
    first = model.sequence(40)
    model.runner.execute(make_batch(prefill=[first.row()]))
    second = model.sequence(0)
    second.token_ids, second.num_computed = list(first.token_ids), 40
    copied = model.free_blocks.pop()
    second.block_ids = [*first.block_ids[:2], copied]
    model.runner.copy_blocks([BlockCopy(first.block_ids[2], copied)])
    first.token_ids.append(3)
    second.token_ids.append(4)
    logits = model.runner.forward_logits(make_batch([first.row(), second.row()]))
    assert_logits_equal(logits, torch.stack([model.logits(s.token_ids)[-1] for s in (first, second)]))


def test_parts_of_a_batch_may_be_run_again(tiny_model, make_batch):
    model = tiny_model()
    sequences = [model.sequence(n) for n in (20, 50)]
    model.runner.execute(make_batch(prefill=[s.row() for s in sequences]))
    for sequence in sequences:
        sequence.token_ids.append(8)
    batch = make_batch([s.row() for s in sequences], [model.sequence(33).row()])
    whole = model.runner.execute(batch).sampled
    parts = [model.runner.execute(batch.part(i, i + 1)).sampled[0] for i in range(3)]
    assert parts == whole
    assert model.runner.execute(batch).sampled == whole


def test_a_step_without_rows_only_releases(tiny_model):
    model = tiny_model()
    assert model.runner.execute(ScheduledBatch([], 0, finished_seq_ids=["gone"])).sampled == []
