# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The scheduler's half of the host tier: which pages leave the GPU, and when.

Nothing happens before blocks run short. What becomes of a page that leaves, and what it
takes for that, is in the books (``books.py``).
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import vllm
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_clusterkv.recall.books import Books, Spilled
from vllm_clusterkv.recall.messages import Orders

RESERVED_BLOCKS = 2
"""Blocks that admission of waiting requests leaves free: a spill begins by taking one
for entries, which no admission must have made impossible."""

STEPS_OF_A_COPY = 4
"""Steps from a copy's start until its blocks are free, on a GPU, and one to spare."""

MIN_PAGES_FOR_INDEX_BLOCK = 2
"""Pages that must leave for a new index block, which takes the room of one."""


class RecallScheduler:
    """Decides which pages leave the GPU, at the end of each ``schedule()``.

    Blocks that are freed it sees by wrapping ``pop_blocks_for_free`` of the single KV
    cache manager, which finishing, aborts and preemption all pass; vLLM has no hook for
    the last.

    All decisions are about whole pages, so one of these serves all ranks.

    Attributes:
        books: What became of the pages that were to leave.
    """

    def __init__(
        self,
        num_host_pages: int,
        max_slots: int,
        entries_per_block: int,
        block_size: int,
        world_size: int,
        min_spillable_len: int,
        watermark: float,
        max_transfers: int = 16,
        num_hot_blocks: int = 0,
    ) -> None:
        """
        Args:
            num_host_pages: Size of the host pool.
            max_slots: Requests that may have pages on the host at a time.
            entries_per_block: Pages whose index fits a block; at least 2.
            block_size: Tokens a page.
            world_size: Ranks that acknowledge a transfer.
            min_spillable_len: Tokens a request must have to lose pages: as many as
                make its rows sparse in a batch of any size, since dense rows read
                every page on the GPU.
            watermark: Share of the blocks to keep free.
            max_transfers: Transfers under way at a time.
            num_hot_blocks: That a request gets with its slot.

        Raises:
            ValueError: An index block could never hold more pages than it costs.
        """
        if entries_per_block < MIN_PAGES_FOR_INDEX_BLOCK:
            raise ValueError(
                f"entries_per_block must be at least {MIN_PAGES_FOR_INDEX_BLOCK}, "
                f"got {entries_per_block}"
            )
        self.books = Books(
            num_host_pages,
            max_slots,
            entries_per_block,
            num_hot_blocks,
            block_size,
            world_size,
        )
        self._entries_per_block = entries_per_block
        self._block_size = block_size
        self._min_spillable_len = min_spillable_len
        self._watermark = watermark
        self._max_transfers = max_transfers
        self._num_hot_blocks = num_hot_blocks
        # Pages of a request that must leave to free more blocks than its slot takes.
        self._min_pages = num_hot_blocks + MIN_PAGES_FOR_INDEX_BLOCK
        while self._gain(self._min_pages) < 1:
            self._min_pages += 1

        self._requests: dict[str, Request] = {}
        self._waiting: tuple[Request, int] | None = None
        # By request, (complete pages, num_frees) when none of its pages could leave.
        # Before one of both has changed it is not looked at again.
        self._fruitless: dict[str, tuple[int, int]] = {}
        self._num_frees = 0

        # Set by bind().
        self._pool: BlockPool
        self._reserved_blocks: int
        self._watermark_blocks: int

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Hooks into vLLM's cache manager (``bind_kv_cache_manager``).

        Args:
            kv_cache_manager: The scheduler's, just made.

        Raises:
            RuntimeError: This vLLM lacks a name that the host tier relies on, or the
                KV cache has another shape than one group of full attention in blocks
                of ``block_size`` tokens.
        """
        _require(kv_cache_manager, "coordinator", "block_pool", "watermark_blocks")
        _require(kv_cache_manager.coordinator, "single_type_managers")
        managers = kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or managers[0].block_size != self._block_size:
            sizes = [manager.block_size for manager in managers]
            raise RuntimeError(
                "the host tier needs one KV cache group in blocks of "
                f"{self._block_size} tokens, got block sizes {sizes}"
            )
        manager = managers[0]
        pool = kv_cache_manager.block_pool
        _require(manager, "req_to_blocks", "_null_block", "pop_blocks_for_free")
        _require(
            pool,
            "num_gpu_blocks",
            "free_blocks",
            "get_cached_block",
            "get_new_blocks",
            "get_num_free_blocks",
            "unpin_blocks",
        )
        _require(manager._null_block, "block_id", "is_null", "ref_cnt")
        self.books.bind(pool, manager)
        self._pool = pool
        self._watermark_blocks = int(self._watermark * pool.num_gpu_blocks)
        kv_cache_manager.watermark_blocks = max(
            kv_cache_manager.watermark_blocks, RESERVED_BLOCKS + self._num_hot_blocks
        )
        self._reserved_blocks = kv_cache_manager.watermark_blocks

        pop_blocks = manager.pop_blocks_for_free

        def pop_blocks_for_free(request_id: str) -> list[KVCacheBlock]:
            self._num_frees += 1
            self._fruitless.pop(request_id, None)
            self.books.end(request_id)
            return pop_blocks(request_id)

        manager.pop_blocks_for_free = pop_blocks_for_free  # type: ignore[method-assign]

    def note_waiting(self, request: Request, num_local_tokens: int) -> None:
        """A request may be admitted in this step (``get_num_new_matched_tokens``).

        The last one noted and not allocated before ``plan`` is taken to be held up
        by a want of blocks. A hint, for this step alone.

        Args:
            request: At the head of the queue.
            num_local_tokens: Of its tokens, found in the prefix cache.
        """
        self._waiting = request, num_local_tokens

    def note_allocated(self, request: Request) -> None:
        """A request has been admitted (``update_state_after_alloc``).

        Args:
            request: New, or resumed after preemption.
        """
        self._requests[request.request_id] = request
        if self._waiting is not None and self._waiting[0] is request:
            self._waiting = None

    def plan(self, scheduler_output: SchedulerOutput) -> Orders:
        """Ends a ``schedule()``: what workers have to do (``build_connector_meta``).

        Args:
            scheduler_output: Of the step. vLLM has allocated its blocks, but not yet
                advanced the requests' ``num_computed_tokens``.

        Returns:
            Every change since the last call, and new transfers.
        """
        waiting, self._waiting = self._waiting, None
        self.books.move_tails(scheduler_output.num_scheduled_tokens)
        # A step without tokens does not index the pages that the last one filled.
        if scheduler_output.total_num_scheduled_tokens > 0:
            num_short = self._num_blocks_short(waiting, scheduler_output)
            if num_short > 0:
                self._spill(scheduler_output, num_short)
        return self.books.take_orders()

    def forget(self, request: Request) -> None:
        """A request has finished or was aborted (``request_finished_all_groups``).

        What it holds is given back when vLLM frees its blocks, right after this.

        Args:
            request: Need not have been allocated.
        """
        self._requests.pop(request.request_id, None)

    def _num_blocks_short(
        self, waiting: tuple[Request, int] | None, output: SchedulerOutput
    ) -> int:
        """Blocks to be freed beyond what is free or about to be."""
        num_at_hand = self._pool.get_num_free_blocks() + self.books.num_pending_frees
        num_kept = max(self._reserved_blocks, self._watermark_blocks)
        num_short = num_kept - num_at_hand
        if waiting is not None:
            for_waiting = self._num_blocks_wanted(*waiting) + self._reserved_blocks
            for_waiting -= num_at_hand
            # Not for a request that waits for others to end in any case.
            if for_waiting <= self._most_to_free(output):
                # Others take blocks while copies are under way: without some more, what
                # is at hand would stay just below what is needed.
                num_short = max(num_short, for_waiting + self._num_soon_taken(output))
        return num_short

    def _num_soon_taken(self, output: SchedulerOutput) -> int:
        """Blocks that the step's requests take while a copy is under way."""
        num_taken = 0
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self._requests[request_id]
            now = request.num_computed_tokens + num_tokens
            soon = now + STEPS_OF_A_COPY * num_tokens
            if now < request.num_tokens:
                soon = min(soon, request.num_tokens)
            num_taken += cdiv(soon, self._block_size) - cdiv(now, self._block_size)
        return num_taken

    def _gain(self, num_pages: int, spilled: Spilled | None = None) -> int:
        """Blocks that more pages of a request free, less what it takes for that."""
        num_entries = 0 if spilled is None else len(spilled.free_entries)
        num_without_entry = max(num_pages - num_entries, 0)
        num_hot_blocks = self._num_hot_blocks if spilled is None else 0
        return (
            num_pages
            - num_hot_blocks
            - cdiv(num_without_entry, self._entries_per_block)
        )

    def _most_to_free(self, output: SchedulerOutput) -> int:
        """Blocks that transfers could free, in this step and later ones, at most."""
        most = 0
        for request in self._victims(output):
            spilled = self.books.spilled.get(request.request_id)
            num_pages = request.num_computed_tokens // self._block_size - 1
            if spilled is not None:
                num_pages -= len(spilled.pages)
            most += max(self._gain(num_pages, spilled), 0)
        return min(most, self.books.num_free_host_pages)

    def _num_blocks_wanted(self, request: Request, num_local_tokens: int) -> int:
        """Blocks that admitting the request would take from the free ones."""
        num_wanted = cdiv(request.num_tokens, self._block_size)
        # A cached page that nobody holds is among the free blocks: it is no gain.
        for block_hash in request.block_hashes[: num_local_tokens // self._block_size]:
            cached = self._pool.get_cached_block(block_hash, [0])
            if cached is not None and cached[0].ref_cnt > 0:
                num_wanted -= 1
        return num_wanted

    def _spill(self, output: SchedulerOutput, num_short: int) -> None:
        """Starts transfers that will free so many blocks, or as many as can be."""
        for request in self._victims(output):
            if num_short <= 0 or not self._num_may_start():
                return
            num_short -= self._spill_request(request, num_short)

    def _num_may_start(self) -> int:
        """Transfers that there is room for now."""
        books = self.books
        return min(books.num_free_host_pages, self._max_transfers - books.num_pending)

    def _victims(self, output: SchedulerOutput) -> Iterator[Request]:
        """Requests that may lose pages in this step, the best first.

        First those with a slot, which pay for it already; then the longest.
        """
        scheduled = output.num_scheduled_tokens
        # Having a slot they decode: what they generate is computed token by token,
        # and preemption takes the slot away.
        for request_id, spilled in list(self.books.spilled.items()):
            if request_id in scheduled:
                yield spilled.request
        if not self.books.num_free_slots:
            return
        cached = output.scheduled_cached_reqs
        candidates = []
        for request_id in cached.req_ids:
            if scheduled[request_id] != 1 or request_id in self.books.spilled:
                continue
            request = self._requests[request_id]
            if (
                request.num_tokens >= self._min_spillable_len
                and request_id not in cached.resumed_req_ids
                # Set behind the last step: whether this one computes known tokens.
                and not request.is_prefill_chunk
                # Goes back to its prompt's pages when more of it arrives.
                and not request.resumable
            ):
                candidates.append(request)
        candidates.sort(key=lambda request: request.num_computed_tokens, reverse=True)
        for request in candidates:
            # Those tried before may have taken the last one.
            if not self.books.num_free_slots:
                return
            yield request

    def _spill_request(self, request: Request, num_short: int) -> int:
        """Starts transfers of a request's pages, first pages first.

        Returns:
            Blocks that this frees, less those that it takes for entries.
        """
        request_id = request.request_id
        spilled = self.books.spilled.get(request_id)
        # Complete and indexed: filled by earlier steps. The tail is not among them.
        num_complete = request.num_computed_tokens // self._block_size
        num_gone = 0 if spilled is None else len(spilled.pages)
        seen = num_complete, self._num_frees
        if num_complete - 1 <= num_gone or self._fruitless.get(request_id) == seen:
            return 0

        gain = 0
        while gain < num_short:
            num_entries = 0 if spilled is None else len(spilled.free_entries)
            num_hot_blocks = self._num_hot_blocks if spilled is None else 0
            # What makes up for the blocks that it takes, in this step and later ones.
            num_to_start = 1 if num_entries else MIN_PAGES_FOR_INDEX_BLOCK
            num_needed = self._min_pages if spilled is None else num_to_start
            room = self._num_may_start()
            if self.books.num_free_host_pages < num_needed or room < num_to_start:
                break
            # Their leaving frees blocks. Not the first, which holds the sinks.
            pages = list(
                islice(
                    self.books.own_pages(request_id, range(1, num_complete)),
                    # One more, in case that they need an index block.
                    max(num_needed, min(room, num_short - gain + 1)),
                )
            )
            if len(pages) < num_needed:
                if gain == 0:
                    self._fruitless[request_id] = seen
                break
            if num_entries == 0:
                if self._pool.get_num_free_blocks() < 1 + num_hot_blocks:
                    break
                if spilled is None:
                    spilled = self.books.take_slot(request)
                self.books.take_index_block(spilled)
                gain -= 1 + num_hot_blocks
                # Taking a block may release clean pages, this request's too: look
                # at them afresh.
                continue
            assert spilled is not None
            pages = pages[: min(room, num_entries, num_short - gain)]
            for page_number in pages:
                self.books.start_copy(spilled, page_number)
            gain += len(pages)
        return gain


def _require(owner: Any, *names: str) -> None:
    """Checks that an object of vLLM has what the host tier relies on.

    Raises:
        RuntimeError: Something is missing.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"the host tier does not fit vLLM {vllm.__version__}: "
            f"{type(owner).__name__} has no {', '.join(missing)}"
        )
