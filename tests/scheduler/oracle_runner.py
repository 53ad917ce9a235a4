"""A runner that computes nothing, and knows what a real one would have to find in every K/V slot that a step reads.

It stores there token, position and a digest of the prefix and its salt, and checks each read against the reading
request's own history, in every layer group as far as its window lets a token see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from msgspec import structs
from octavo.block_manager.manager import BlockManager
from octavo.scheduler.batch import BlockCopy, PendingStep, SampledRow, ScheduledBatch, ScheduledRow, StepResult
from watched_scheduler import require

ALPHABET = 3


def digest(tokens: Sequence[int], salt: str) -> bytes:
    return sha256(f"{salt}|{list(tokens)}".encode()).digest()


def next_token(tokens: Sequence[int], seed: int) -> int:
    """What the oracle's model says after `tokens`: any deterministic function of history and seed."""
    return sha256(f"{seed}|{list(tokens)}".encode()).digest()[0] % ALPHABET


@dataclass
class BrokenStep:
    error: Exception

    def result(self) -> StepResult:
        raise self.error


class OracleRunner:
    """Executes batches over a dictionary of slots, and where it runs ahead, keeps what it drew until it is asked."""

    def __init__(self, block_size: int, windows: Sequence[int | None], runs_ahead: bool) -> None:
        self.block_size = block_size
        self.windows = windows
        """Of each layer group."""
        self.runs_ahead = runs_ahead
        self.drawn: dict[str, int] = {}
        """What the latest step drew for each sequence: all that the next one may know of it."""
        self.slots: dict[tuple[int, int, int], tuple[int, int, bytes]] = {}
        """(layer group, block, offset) → what was written there."""
        self.salts: dict[str, str] = {}
        self.poisoned: set[str] = set()
        self.manager: BlockManager | None = None
        self.budget = 0
        self.known: set[str] = set()

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            for offset in range(self.block_size):
                content = self.slots.get((copy.group, copy.source, offset))
                if content is None:
                    self.slots.pop((copy.group, copy.target, offset), None)
                else:
                    self.slots[copy.group, copy.target, offset] = content

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        require(self.runs_ahead or not any(row.num_unknown_tokens for row in batch.rows), "a token is not known")
        rows = [self._complete(row) for row in batch.rows]
        try:
            result = self._execute(replace(batch, rows=rows))
        except RuntimeError as error:
            if not self.runs_ahead:
                raise
            self.drawn = {row.seq_id: 0 for row in rows if row.draws_token}  # what a broken step leaves behind
            return BrokenStep(error)
        self.drawn = {row.seq_id: row.token_ids[0] for row in result.sampled}
        return result

    def _complete(self, row: ScheduledRow) -> ScheduledRow:
        """The row with the token that only this runner knows."""
        if not row.num_unknown_tokens:
            return row
        return structs.replace(row, token_ids=[*row.token_ids, self.drawn[row.seq_id]], num_unknown_tokens=0)

    def _execute(self, batch: ScheduledBatch) -> StepResult:
        require(batch.num_tokens <= self.budget, "the step exceeds its token budget")
        counts = [row.num_scheduled_tokens for row in batch.rows]
        require(all(count == 1 for count in counts[: batch.num_decode_rows]), "a decode row has several tokens")
        require(all(count > 1 for count in counts[batch.num_decode_rows :]), "decode rows are not first")
        require(len({row.seq_id for row in batch.rows}) == len(batch.rows), "a sequence is scheduled twice")
        for row in batch.rows:
            if row.seq_id.rpartition("/")[0] in self.poisoned:
                raise RuntimeError("poisoned")
        for act in (self._write, self._read):
            for row in batch.rows:
                for group in range(len(self.windows)):
                    act(row, group)
        self.known.update(row.seq_id for row in batch.rows)
        return StepResult(
            [SampledRow(row.seq_id, [next_token(row.token_ids, row.seed)]) for row in batch.rows if row.draws_token]
        )

    def release(self, seq_ids: Sequence[str]) -> None:
        self.known.difference_update(seq_ids)

    def _locate(self, row: ScheduledRow, group: int, position: int) -> tuple[int, int, int]:
        block_id = row.block_ids[group][position // self.block_size]
        require(block_id != 0, f"position {position} of {row.seq_id} is in the reserved block")
        return group, block_id, position % self.block_size

    def _write(self, row: ScheduledRow, group: int) -> None:
        assert self.manager is not None
        salt = self.salts[row.seq_id.rpartition("/")[0]]
        for position in range(row.num_computed_tokens, row.num_tokens_after):
            place = self._locate(row, group, position)
            block = self.manager.groups[group].pool.blocks[place[1]]
            require(block.ref_count == 1, f"{block!r} is written while shared")
            require(block.hash is None, f"{block!r} is written while published")
            prefix = row.token_ids[: position + 1]
            self.slots[place] = (row.token_ids[position], position, digest(prefix, salt))

    def _read(self, row: ScheduledRow, group: int) -> None:
        salt = self.salts[row.seq_id.rpartition("/")[0]]
        window = self.windows[group]
        first = 0 if window is None else max(0, row.num_computed_tokens - window + 1)
        for position in range(first, row.num_tokens_after):
            found = self.slots.get(self._locate(row, group, position))
            expected = (row.token_ids[position], position, digest(row.token_ids[: position + 1], salt))
            require(found == expected, f"{row.seq_id} reads foreign or missing K/V at position {position}")
