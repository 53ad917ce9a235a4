"""What running requests hold of the block manager, and what each of them knows of it without asking."""

from __future__ import annotations

from collections.abc import Iterable

from ..block_manager.manager import BlockManager, PrefixMatch
from .batch import BlockCopy
from .request import Request, RequestStatus


class HeldBlocks:
    """Keeps `block_ids` and `num_writable_tokens` of requests in step with their tables."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager

    def begin(self, request: Request, match: PrefixMatch) -> None:
        """Blocks for all that is known of a request: those that were found, then its own."""
        self._manager.begin(request.seq_id, match)
        request.block_ids = self._manager.block_ids(request.seq_id)
        request.num_computed_tokens = match.num_tokens
        self.grow(request)

    def fork(self, leader: Request, sibling: Request, num_tokens: int) -> None:
        """The leader's first `num_tokens` tokens, shared. Nobody may write the last of their blocks now."""
        self._manager.fork(leader.seq_id, sibling.seq_id, num_tokens)
        leader.num_writable_tokens = 0
        sibling.block_ids = self._manager.block_ids(sibling.seq_id)
        sibling.num_computed_tokens = num_tokens

    def growing(self, running: Iterable[Request]) -> list[Request]:
        """Those whose newest token needs a block that they do not have, or not alone. In most steps, few."""
        return [
            request
            for request in running
            if len(request.token_ids) + request.num_drawing_tokens > request.num_writable_tokens
            and not request.is_complete
        ]

    def num_missing(self, growing: Iterable[Request]) -> int:
        """Free blocks that growing all of them takes, at most."""
        return sum(
            self._manager.blocks_to_grow(request.seq_id, request.num_computed_tokens, request.num_tokens)
            for request in growing
        )

    def grow(self, request: Request) -> list[BlockCopy]:
        """Blocks for every token that is known or being drawn."""
        num_tokens = request.num_tokens
        copies = self._manager.grow(request.seq_id, request.num_computed_tokens, num_tokens)
        request.num_writable_tokens = self._manager.blocks_for(num_tokens) * self._manager.block_size
        return [BlockCopy(copy.source, copy.target) for copy in copies]

    def num_lost(self, request: Request) -> int:
        """Computed tokens that nobody has any more once this request gives up its blocks."""
        return self._manager.num_exclusive_tokens(request.seq_id, request.num_computed_tokens)

    def free(self, request: Request) -> None:
        self._manager.free(request.seq_id)
        request.block_ids = ()
        request.num_writable_tokens = 0

    def publish(self, request: Request, num_tokens: int) -> None:
        """The first `num_tokens` tokens are computed."""
        self._manager.publish(request.seq_id, request.block_hashes, request.token_ids, num_tokens)

    def withdraw(self, request: Request) -> None:
        """Nobody shall find what a request has computed any more, nor what it found itself and went on from."""
        if request.status is RequestStatus.RUNNING:
            self._manager.unpublish(request.seq_id)
        # One that was preempted has no blocks, but what it published before can still be found.
        self._manager.withdraw(request.block_hashes)
