"""What the device knows of block tables and parameters after every step, against the scheduler's own."""

from __future__ import annotations

import torch
from octavo.model.device_slots import DeviceSlots
from octavo.scheduler.batch import ScheduledRow
from octavo.scheduler.sampling_params import SamplingParams

BLOCK = 16


def row(
    seq_id: str, table: list[int], position: int, params: SamplingParams | None = None, seed: int = 0
) -> ScheduledRow:
    """One token at `position`; `table` is the live view."""
    return ScheduledRow(seq_id, [5] * (position + 1), 1, position, 1, (table,), params or SamplingParams(), seed)


def known_table(slots: DeviceSlots, rows: list[ScheduledRow]) -> list[list[int]]:
    places = slots.update(rows)
    return [
        slots.block_tables[0, slot, : len(one.block_ids[0])].tolist()
        for slot, one in zip(places.tolist(), rows, strict=True)
    ]


def test_tables_follow_growth_and_copies_on_write() -> None:
    slots = DeviceSlots(3, 8, BLOCK, torch.device("cpu"))
    a, b = [1, 2], [3]
    assert known_table(slots, [row("a", a, 20), row("b", b, 3)]) == [[1, 2], [3]]
    a[1] = 7  # copied on write
    b.append(4)
    assert known_table(slots, [row("b", b, 16), row("a", a, 21)]) == [[3, 4], [1, 7]]


def test_a_copy_on_write_in_a_step_that_did_not_come_by_is_noticed() -> None:
    """A mixed step replaces the block that position 15 lies in; the next pure decode step writes position 16."""
    slots = DeviceSlots(2, 8, BLOCK, torch.device("cpu"))
    table = [1]
    known_table(slots, [row("a", table, 14)])
    table[0] = 2
    table.append(5)
    assert known_table(slots, [row("a", table, 16)]) == [[2, 5]]


def test_a_sequence_that_was_preempted_has_another_table() -> None:
    slots = DeviceSlots(2, 8, BLOCK, torch.device("cpu"))
    known_table(slots, [row("a", [1, 2, 3], 40)])
    assert known_table(slots, [row("a", [4, 5, 3], 40)]) == [[4, 5, 3]]


def test_sequences_that_do_not_run_make_room() -> None:
    slots = DeviceSlots(2, 8, BLOCK, torch.device("cpu"))
    known_table(slots, [row("a", [1], 0), row("b", [2], 0)])
    known_table(slots, [row("c", [3], 0), row("b", [2], 1)])  # a waits, preempted
    hot = SamplingParams(temperature=0.5, top_k=3)
    rows = [row("a", [4], 0, hot, seed=2**64 - 1), row("d", [5], 0)]
    assert known_table(slots, rows) == [[4], [5]]
    slot = int(slots.update(rows)[0])
    assert (float(slots.temperatures[slot]), int(slots.top_ks[slot]), int(slots.seeds[slot])) == (0.5, 3, -1)


def test_padding_has_a_slot_of_its_own() -> None:
    slots = DeviceSlots(2, 8, BLOCK, torch.device("cpu"))
    taken = slots.update([row("a", [1], 0), row("b", [2], 0)]).tolist()
    assert slots.padding_slot not in taken
    assert slots.block_tables[0, slots.padding_slot].tolist() == [0] * 8


def test_each_layer_group_has_tables_of_its_own_and_windows_pass() -> None:
    slots = DeviceSlots(2, 8, BLOCK, torch.device("cpu"), num_groups=2)
    full, windowed = [1, 2, 3], [7, 8, 9]
    step = ScheduledRow("a", [5] * 60, 1, 40, 1, (full, windowed), SamplingParams(), 0)
    other = ScheduledRow("b", [5] * 60, 1, 3, 1, ([4], [5]), SamplingParams(), 0)
    places = slots.update([other, step]).tolist()
    assert slots.block_tables[:, places[1], :4].tolist() == [[1, 2, 3, 0], [7, 8, 9, 0]]
    assert slots.block_tables[:, places[0], :2].tolist() == [[4, 0], [5, 0]]
    windowed[:] = [0, 8, 6, 9]  # a copy on write of block 2, a new one, and the window has passed the first
    full.append(4)
    step = ScheduledRow("a", [5] * 60, 1, 48, 1, (full, windowed), SamplingParams(), 0)
    slots.update([step])
    assert slots.block_tables[0, places[1], :4].tolist() == [1, 2, 3, 4]
    assert slots.block_tables[1, places[1], 2:4].tolist() == [6, 9]
