"""What running requests hold of the block manager, and what each of them knows of it without asking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..block_manager.manager import BlockManager, PrefixMatch
from .batch import BlockCopy
from .request import Request, RequestStatus


class HeldBlocks:
    """Keeps `block_ids`, `num_writable_tokens` and `passes_next_at` of requests in step with their tables."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._copies: list[BlockCopy] = []

    def begin(self, request: Request, match: PrefixMatch) -> None:
        """The blocks that were found, and those of all that is known of a request in groups that keep everything.
        Groups with a window give theirs part by part, by `reserve`."""
        manager = self._manager
        manager.begin(request.seq_id, match, request.num_tokens)
        request.num_computed_tokens = match.num_tokens
        request.num_writable_tokens = match.num_tokens if manager.has_windows else self._rounded(request.num_tokens)
        self._note_tables(request)

    def fork(self, leader: Request, sibling: Request, num_tokens: int) -> bool:
        """The leader's first `num_tokens` tokens, shared. False if it does not have all of them any more."""
        if not self._manager.can_fork(leader.seq_id, num_tokens):
            return False
        self._manager.fork(leader.seq_id, sibling.seq_id, num_tokens)
        leader.num_writable_tokens = 0  # nobody may write the last of their blocks now
        sibling.num_computed_tokens = num_tokens
        self._note_tables(sibling)
        return True

    def _note_tables(self, request: Request) -> None:
        request.block_ids = self._manager.block_ids(request.seq_id)
        request.passes_next_at = self._manager.passes_next_at(request.seq_id)

    def _rounded(self, num_tokens: int) -> int:
        return self._manager.blocks_for(num_tokens) * self._manager.block_size

    def growing(self, running: Iterable[Request]) -> list[Request]:
        """Those that decode, and whose newest token needs a block that they do not have, or not alone. In most steps,
        few."""
        growing = []
        for request in running:
            num_tokens = len(request.token_ids) + request.num_drawing_tokens
            if num_tokens > request.num_writable_tokens and num_tokens - request.num_computed_tokens <= 1:
                growing.append(request)
        return [request for request in growing if not request.is_complete]

    def can_grow(self, growing: Iterable[Request], *, but_windows: bool = False) -> bool:
        """Whether there are free blocks for all of them, `but_windows`: in the groups that keep everything."""
        missing = [0] * len(self._manager.groups)
        for request in growing:
            needed = self._manager.blocks_to_grow(request.seq_id, request.num_computed_tokens, request.num_tokens)
            missing = [total + more for total, more in zip(missing, needed, strict=True)]
        return all(
            count <= group.pool.num_free or (but_windows and group.window is not None)
            for count, group in zip(missing, self._manager.groups, strict=True)
        )

    def grow(self, request: Request) -> None:
        """Blocks for every token that is known or being drawn; none if there are not enough."""
        if not self._manager.has_windows or self.can_grow([request]):
            self._grow(request, request.num_tokens)

    def _grow(self, request: Request, num_tokens: int) -> None:
        copies = self._manager.grow(request.seq_id, request.num_computed_tokens, num_tokens)
        self._copies += [BlockCopy(copy.source, copy.target, copy.group) for copy in copies]
        request.num_writable_tokens = self._rounded(num_tokens)

    def take_copies(self) -> list[BlockCopy]:
        """What growing has made necessary since the last call, in order."""
        copies, self._copies = self._copies, []
        return copies

    def reserve(self, request: Request, count: int) -> int:
        """Blocks for the next `count` tokens of a prompt, or as many of them as there is room for; how many that is."""
        before = request.num_computed_tokens
        if before + count <= request.num_writable_tokens:
            return count
        after = self._manager.tokens_with_room(request.seq_id, before, before + count)
        if after <= before:
            return 0
        self._grow(request, after)
        return after - before

    def spare(self, running: Sequence[Request]) -> list[int]:
        """Blocks of each group that an admission may use: one per running sequence stays in reserve, and what prompts
        under way have been promised and not taken yet."""
        spare = [num_free - len(running) for num_free in self._manager.num_free_blocks]
        if self._manager.has_windows:
            for request in running:
                if request.num_pending_tokens > 1:
                    owed = self._manager.blocks_owed(request.seq_id, request.num_tokens)
                    spare = [left - more for left, more in zip(spare, owed, strict=True)]
        return spare

    def fits(self, request: Request, match: PrefixMatch, spare: Sequence[int]) -> bool:
        """Whether a request may be admitted."""
        return _fits(self._manager.blocks_to_admit(match, request.num_tokens), spare)

    def cost_of_preempting(self, request: Request) -> tuple[int, int, tuple[int, int, int]]:
        """Least important first, then whoever loses the least computed work, then the newest."""
        lost = self._manager.num_exclusive_tokens(request.seq_id, request.num_computed_tokens)
        priority, arrival, sample = request.order
        return (-priority, lost, (0, -arrival, -sample))

    def free(self, request: Request) -> None:
        self._manager.free(request.seq_id)
        request.block_ids = ()
        request.num_writable_tokens = 0

    def publish(self, request: Request, num_tokens: int) -> None:
        """The first `num_tokens` tokens are computed."""
        self._manager.publish(request.seq_id, request.block_hashes, request.token_ids, num_tokens)

    def pass_window(self, request: Request, num_tokens: int) -> None:
        """The first `num_tokens` tokens are computed, by steps that have ended: windows move on."""
        self._manager.pass_window(request.seq_id, num_tokens)
        request.passes_next_at = self._manager.passes_next_at(request.seq_id)

    def withdraw(self, request: Request) -> None:
        """Nobody shall find what a request has computed any more, nor what it found itself and went on from."""
        if request.status is RequestStatus.RUNNING:
            self._manager.unpublish(request.seq_id)
        # One that was preempted has no blocks, but what it published before can still be found.
        self._manager.withdraw(request.block_hashes)


def _fits(needed: Sequence[int], free: Sequence[int]) -> bool:
    return all(map(int.__le__, needed, free))
