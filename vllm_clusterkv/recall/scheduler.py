# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The scheduler's half of the host tier: which pages leave the GPU, and when.

Life of a page of a decoding request:

    resident --plan--> copying --acknowledge--> clean --reuse of its block--> released

A *copying* page still holds its block. A *clean* one has given it back to the pool,
which counts it as free, but is read there until the pool hands it out; only then is
the page *released* and read from the host. A page stays where it got to until its
request finishes, is aborted or is preempted; then everything is given back at once.

Nothing happens before blocks run short, and no block is held once no request lives.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from typing import Any

import vllm
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_clusterkv.recall.messages import (
    ClearSlot,
    IndexEntry,
    Orders,
    Release,
    SetTail,
    StartSlot,
    Transfer,
)

RESERVED_BLOCKS = 2
"""Blocks that admission of waiting requests leaves free: a spill begins by taking one
for entries, which no admission must have made impossible."""

STEPS_OF_A_COPY = 4
"""Steps from a copy's start until its blocks are free, on a GPU, and one to spare."""

MIN_PAGES_FOR_INDEX_BLOCK = 2
"""Pages that must leave for a new index block, which takes the room of one."""


@dataclass(frozen=True)
class RecallCounts:
    """What the host tier holds, and what it has done so far.

    Attributes:
        num_resident: Pages that requests hold in blocks.
        num_copying: Pages under way to the host, also of requests that have ended.
        num_clean: Pages on the host that are still read on the GPU.
        num_released: Pages whose block has a new owner, read from the host.
        num_free_host_pages: Host pages without a page.
        num_slots: Requests with a slot.
        total_copied: Pages that reached the host while their request lived.
        total_released: Pages released.
        total_late: Pages that reached the host after their request had ended.
    """

    num_resident: int
    num_copying: int
    num_clean: int
    num_released: int
    num_free_host_pages: int
    num_slots: int
    total_copied: int
    total_released: int
    total_late: int


class _State(Enum):
    COPYING = auto()
    CLEAN = auto()
    RELEASED = auto()


@dataclass(eq=False, slots=True)
class _Page:
    """A page that is not simply resident."""

    block: KVCacheBlock
    host_page: int
    entry: IndexEntry
    state: _State = _State.COPYING


@dataclass(eq=False, slots=True)
class _Spilled:
    """A request with a slot, from its first transfer until its blocks are freed.

    Compared by identity: a request that is preempted and spilled again is another.
    """

    request: Request
    slot: int
    tail_end: int = 0  # Tokens computed from which the tail is another block.
    pages: dict[int, _Page] = field(default_factory=dict)
    index_blocks: list[KVCacheBlock] = field(default_factory=list)
    free_entries: list[IndexEntry] = field(default_factory=list)
    hot_blocks: list[KVCacheBlock] = field(default_factory=list)
    ended: bool = False


@dataclass(eq=False, slots=True)
class _Copy:
    """A transfer under way."""

    owner: _Spilled
    page_number: int
    page: _Page
    num_ranks_done: int = 0


class RecallScheduler:
    """Decides which pages leave the GPU, and keeps the books.

    It edits vLLM's block tables itself, at moments that vLLM gives a connector:
    ``plan`` at the end of each ``schedule()``, ``acknowledge`` when a step's output is
    processed. Blocks that are freed it sees by wrapping ``pop_blocks_for_free`` of the
    single KV cache manager, which finishing, aborts and preemption all pass; vLLM has
    no hook for the last.

    All decisions are about whole pages, so one of these serves all ranks.
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
        self._entries_per_block = entries_per_block
        self._block_size = block_size
        self._world_size = world_size
        self._min_spillable_len = min_spillable_len
        self._watermark = watermark
        self._max_transfers = max_transfers
        self._num_hot_blocks = num_hot_blocks
        # Pages of a request that must leave to free more blocks than its slot takes.
        self._min_pages = num_hot_blocks + MIN_PAGES_FOR_INDEX_BLOCK
        while self._gain(self._min_pages) < 1:
            self._min_pages += 1

        # Taken from the end: low numbers first.
        self._free_host_pages = list(range(num_host_pages - 1, -1, -1))
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._requests: dict[str, Request] = {}
        self._spilled: dict[str, _Spilled] = {}
        # By block id, the clean pages read there. Several when a prefix hit let
        # another request own a clean page's block, and that spilled it too.
        self._owners: dict[int, list[tuple[_Spilled, int]]] = {}
        self._copies: dict[int, _Copy] = {}
        self._num_late_copies = 0
        self._next_transfer = 0
        self._waiting: tuple[Request, int] | None = None
        self._orders = Orders()  # That the next plan() gives to the workers.
        # By request, (complete pages, num_frees) when none of its pages could leave.
        # Before one of both has changed it is not looked at again.
        self._fruitless: dict[str, tuple[int, int]] = {}
        self._num_frees = 0

        self._num_clean = 0
        self._num_released = 0
        self._total_copied = 0
        self._total_released = 0
        self._total_late = 0

        # Set by bind().
        self._pool: BlockPool
        self._manager: SingleTypeKVCacheManager
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
        self._pool = pool
        self._manager = manager
        self._watermark_blocks = int(self._watermark * pool.num_gpu_blocks)
        kv_cache_manager.watermark_blocks = max(
            kv_cache_manager.watermark_blocks, RESERVED_BLOCKS + self._num_hot_blocks
        )
        self._reserved_blocks = kv_cache_manager.watermark_blocks

        pop_blocks = manager.pop_blocks_for_free

        def pop_blocks_for_free(request_id: str) -> list[KVCacheBlock]:
            self._end(request_id)
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
        if self._spilled:
            self._move_tails(scheduler_output.num_scheduled_tokens)
        # A step without tokens does not index the pages that the last one filled.
        if scheduler_output.total_num_scheduled_tokens > 0:
            num_short = self._num_blocks_short(waiting, scheduler_output)
            if num_short > 0:
                self._spill(scheduler_output, num_short)
        orders, self._orders = self._orders, Orders()
        return orders

    def acknowledge(self, completed: dict[int, int]) -> None:
        """Takes note of transfers that ranks completed (``update_connector_output``).

        Args:
            completed: By transfer, how many more ranks have completed it.
        """
        for number, num_ranks in completed.items():
            copy = self._copies[number]
            copy.num_ranks_done += num_ranks
            assert copy.num_ranks_done <= self._world_size
            if copy.num_ranks_done < self._world_size:
                continue
            del self._copies[number]
            if copy.owner.ended:
                # Until now a rank might have been writing there.
                self._free_host_pages.append(copy.page.host_page)
                self._num_late_copies -= 1
                self._total_late += 1
            else:
                self._unpin(copy)

    def forget(self, request: Request) -> None:
        """A request has finished or was aborted (``request_finished_all_groups``).

        What it holds is given back when vLLM frees its blocks, right after this.

        Args:
            request: Need not have been allocated.
        """
        self._requests.pop(request.request_id, None)

    @property
    def num_pending(self) -> int:
        """Transfers under way. The engine must step until there are none."""
        return len(self._copies)

    @property
    def num_pending_frees(self) -> int:
        """Transfers under way that will free a block: of requests that still live."""
        return len(self._copies) - self._num_late_copies

    def counts(self) -> RecallCounts:
        """What is where now, and totals."""
        pool = self._pool
        num_held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is null
        num_taken = sum(
            len(spilled.index_blocks) + len(spilled.hot_blocks)
            for spilled in self._spilled.values()
        )
        return RecallCounts(
            num_resident=num_held - num_taken,
            num_copying=len(self._copies),
            num_clean=self._num_clean,
            num_released=self._num_released,
            num_free_host_pages=len(self._free_host_pages),
            num_slots=len(self._spilled),
            total_copied=self._total_copied,
            total_released=self._total_released,
            total_late=self._total_late,
        )

    def _move_tails(self, num_scheduled_tokens: dict[str, int]) -> None:
        """Tells where this step's tokens go, of requests that begin a new block."""
        for request_id, spilled in self._spilled.items():
            # With asynchronous scheduling these include the step in flight; the
            # token of this step comes behind all of them.
            num_computed = spilled.request.num_computed_tokens
            if num_computed >= spilled.tail_end and request_id in num_scheduled_tokens:
                self._set_tail(spilled, num_computed)

    def _set_tail(self, spilled: _Spilled, num_computed: int) -> None:
        tail = num_computed // self._block_size
        blocks = self._manager.req_to_blocks[spilled.request.request_id]
        self._orders.commands.append(SetTail(spilled.slot, blocks[tail].block_id))
        spilled.tail_end = (tail + 1) * self._block_size

    def _num_blocks_short(
        self, waiting: tuple[Request, int] | None, output: SchedulerOutput
    ) -> int:
        """Blocks to be freed beyond what is free or about to be."""
        num_at_hand = self._pool.get_num_free_blocks() + self.num_pending_frees
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

    def _gain(self, num_pages: int, spilled: _Spilled | None = None) -> int:
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
            spilled = self._spilled.get(request.request_id)
            num_pages = request.num_computed_tokens // self._block_size - 1
            if spilled is not None:
                num_pages -= len(spilled.pages)
            most += max(self._gain(num_pages, spilled), 0)
        return min(most, len(self._free_host_pages))

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
            if num_short <= 0 or not self._free_host_pages or not self._num_may_start():
                return
            num_short -= self._spill_request(request, num_short)

    def _num_may_start(self) -> int:
        return self._max_transfers - len(self._copies)

    def _victims(self, output: SchedulerOutput) -> Iterator[Request]:
        """Requests that may lose pages in this step, the best first.

        First those with a slot, which pay for it already; then the longest.
        """
        scheduled = output.num_scheduled_tokens
        # Having a slot they decode: what they generate is computed token by token,
        # and preemption takes the slot away.
        for request_id, spilled in list(self._spilled.items()):
            if request_id in scheduled:
                yield spilled.request
        if not self._free_slots:
            return
        cached = output.scheduled_cached_reqs
        candidates = []
        for request_id in cached.req_ids:
            if scheduled[request_id] != 1 or request_id in self._spilled:
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
            if not self._free_slots:
                return
            yield request

    def _spill_request(self, request: Request, num_short: int) -> int:
        """Starts transfers of a request's pages, first pages first.

        Returns:
            Blocks that this frees, less those that it takes for entries.
        """
        request_id = request.request_id
        spilled = self._spilled.get(request_id)
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
            num_host_pages = len(self._free_host_pages)
            room = min(num_host_pages, self._num_may_start())
            if num_host_pages < num_needed or room < num_to_start:
                break
            pages = list(
                islice(
                    self._spillable_pages(request_id, num_complete),
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
                    spilled = self._take_slot(request)
                self._take_index_block(spilled)
                gain -= 1 + num_hot_blocks
                # Taking a block may release clean pages, this request's too: look
                # at them afresh.
                continue
            assert spilled is not None
            pages = pages[: min(room, num_entries, num_short - gain)]
            for page_number in pages:
                self._start_copy(spilled, page_number)
            gain += len(pages)
        return gain

    def _spillable_pages(self, request_id: str, num_complete: int) -> Iterator[int]:
        """Pages whose leaving frees a block. Not the first, which holds the sinks."""
        blocks = self._manager.req_to_blocks[request_id]
        spilled = self._spilled.get(request_id)
        gone = () if spilled is None else spilled.pages
        for number in range(1, num_complete):
            if number not in gone and blocks[number].ref_cnt == 1:
                yield number

    def _take_slot(self, request: Request) -> _Spilled:
        spilled = _Spilled(request, self._free_slots.pop())
        self._spilled[request.request_id] = spilled
        if self._num_hot_blocks:
            # May release clean pages, of other requests.
            spilled.hot_blocks = self._pool.get_new_blocks(self._num_hot_blocks)
        hot_blocks = tuple(block.block_id for block in spilled.hot_blocks)
        self._orders.commands.append(StartSlot(spilled.slot, hot_blocks))
        self._set_tail(spilled, request.num_computed_tokens)
        return spilled

    def _take_index_block(self, spilled: _Spilled) -> None:
        (block,) = self._pool.get_new_blocks(1)
        spilled.index_blocks.append(block)
        # Taken from the end.
        spilled.free_entries.extend(
            IndexEntry(block.block_id, number)
            for number in reversed(range(self._entries_per_block))
        )

    def _start_copy(self, spilled: _Spilled, page_number: int) -> None:
        block = self._manager.req_to_blocks[spilled.request.request_id][page_number]
        # The request's own reference holds the block until the copy is done.
        page = _Page(block, self._free_host_pages.pop(), spilled.free_entries.pop())
        spilled.pages[page_number] = page
        number = self._next_transfer
        self._next_transfer += 1
        self._copies[number] = _Copy(spilled, page_number, page)
        self._orders.transfers.append(
            Transfer(number, block.block_id, page.host_page, page.entry)
        )

    def _unpin(self, copy: _Copy) -> None:
        """Gives a copied page's block back to the pool, to be read until reused."""
        spilled, page = copy.owner, copy.page
        blocks = self._manager.req_to_blocks[spilled.request.request_id]
        assert blocks[copy.page_number] is page.block
        blocks[copy.page_number] = self._manager._null_block
        page.state = _State.CLEAN
        self._owners.setdefault(page.block.block_id, []).append(
            (spilled, copy.page_number)
        )
        self._num_clean += 1
        self._total_copied += 1
        self._pool.unpin_blocks([page.block], self._on_reuse)

    def _on_reuse(self, block: KVCacheBlock) -> None:
        """The pool hands out a block that was unpinned. Must not call the pool."""
        owners = self._owners.pop(block.block_id, None)
        if owners is None:
            # The requests that read it have ended; the pool cannot be told.
            return
        for spilled, page_number in owners:
            page = spilled.pages[page_number]
            page.state = _State.RELEASED
            self._orders.commands.append(
                Release(spilled.slot, page_number, page.host_page, page.entry)
            )
        self._num_clean -= len(owners)
        self._num_released += len(owners)
        self._total_released += len(owners)
        self._orders.reused_blocks.append(block.block_id)

    def _end(self, request_id: str) -> None:
        """A request finished, was aborted or is preempted: gives back all it holds."""
        self._num_frees += 1
        self._fruitless.pop(request_id, None)
        spilled = self._spilled.pop(request_id, None)
        if spilled is None:
            return
        spilled.ended = True
        self._orders.commands.append(ClearSlot(spilled.slot))
        self._free_slots.append(spilled.slot)
        for page_number, page in spilled.pages.items():
            if page.state is _State.COPYING:
                # Its host page is free when no rank can be writing there any more.
                # The blocks need not wait: what is copied from them from now on, no
                # one reads.
                self._num_late_copies += 1
                continue
            self._free_host_pages.append(page.host_page)
            if page.state is _State.RELEASED:
                self._num_released -= 1
                continue
            self._num_clean -= 1
            owners = self._owners[page.block.block_id]
            owners.remove((spilled, page_number))
            if not owners:
                del self._owners[page.block.block_id]
        self._pool.free_blocks(spilled.index_blocks)
        self._pool.free_blocks(spilled.hot_blocks)


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
