# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The books of the host tier: what became of each page, and what belongs to whom.

Life of a page of a decoding request:

    resident --start_copy--> copying --acknowledge--> clean --reuse--> released

A *copying* page still holds its block. A *clean* one has given it back to the pool,
which counts it as free, but is read there until the pool hands it out; only then is
the page *released* and read from the host. A page stays where it got to until its
request finishes, is aborted or is preempted; then everything is given back at once.

No block is held once no request lives.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
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


class PageState(Enum):
    COPYING = auto()
    CLEAN = auto()
    RELEASED = auto()


@dataclass(eq=False, slots=True)
class Page:
    """A page that is not simply resident."""

    block: KVCacheBlock
    host_page: int
    entry: IndexEntry
    state: PageState = PageState.COPYING


@dataclass(eq=False, slots=True)
class Spilled:
    """A request with a slot, from its first transfer until its blocks are freed.

    Compared by identity: a request that is preempted and spilled again is another.
    """

    request: Request
    slot: int
    tail_end: int = 0  # Tokens computed from which the tail is another block.
    pages: dict[int, Page] = field(default_factory=dict)
    index_blocks: list[KVCacheBlock] = field(default_factory=list)
    free_entries: list[IndexEntry] = field(default_factory=list)
    hot_blocks: list[KVCacheBlock] = field(default_factory=list)
    ended: bool = False


@dataclass(eq=False, slots=True)
class _Copy:
    """A transfer under way."""

    owner: Spilled
    page_number: int
    page: Page
    num_ranks_done: int = 0


class Books:
    """Keeps account of slots, pages and copies, and of what workers must know of them.

    It decides nothing. vLLM's block tables it edits itself, in ``acknowledge``.

    Attributes:
        spilled: By request, those that have a slot, in the order in which they got it.
            To be read only.
    """

    def __init__(
        self,
        num_host_pages: int,
        max_slots: int,
        entries_per_block: int,
        num_hot_blocks: int,
        block_size: int,
        world_size: int,
    ) -> None:
        """
        Args:
            num_host_pages: Size of the host pool.
            max_slots: Requests that may have pages on the host at a time.
            entries_per_block: Pages whose index fits a block.
            num_hot_blocks: That a request gets with its slot.
            block_size: Tokens a page.
            world_size: Ranks that acknowledge a transfer.
        """
        self.spilled: dict[str, Spilled] = {}
        self._entries_per_block = entries_per_block
        self._num_hot_blocks = num_hot_blocks
        self._block_size = block_size
        self._world_size = world_size

        # Taken from the end: low numbers first.
        self._free_host_pages = list(range(num_host_pages - 1, -1, -1))
        self._free_slots = list(range(max_slots - 1, -1, -1))
        # By block id, the clean pages read there. Several when a prefix hit let
        # another request own a clean page's block, and that spilled it too.
        self._owners: dict[int, list[tuple[Spilled, int]]] = {}
        self._copies: dict[int, _Copy] = {}
        self._num_late_copies = 0
        self._next_transfer = 0
        self._orders = Orders()  # That the next take_orders() gives away.

        self._num_clean = 0
        self._num_released = 0
        self._total_copied = 0
        self._total_released = 0
        self._total_late = 0

        # Set by bind().
        self._pool: BlockPool
        self._manager: SingleTypeKVCacheManager

    def bind(self, pool: BlockPool, manager: SingleTypeKVCacheManager) -> None:
        """Says where vLLM's blocks and tables are, before all that needs them."""
        self._pool = pool
        self._manager = manager

    @property
    def num_free_host_pages(self) -> int:
        """Host pages that a copy may take."""
        return len(self._free_host_pages)

    @property
    def num_free_slots(self) -> int:
        """Slots that a request may take."""
        return len(self._free_slots)

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
            for spilled in self.spilled.values()
        )
        return RecallCounts(
            num_resident=num_held - num_taken,
            num_copying=len(self._copies),
            num_clean=self._num_clean,
            num_released=self._num_released,
            num_free_host_pages=len(self._free_host_pages),
            num_slots=len(self.spilled),
            total_copied=self._total_copied,
            total_released=self._total_released,
            total_late=self._total_late,
        )

    def own_pages(self, request_id: str, page_numbers: Iterable[int]) -> Iterator[int]:
        """Those of a request's pages that are resident and that it alone holds."""
        blocks = self._manager.req_to_blocks[request_id]
        spilled = self.spilled.get(request_id)
        gone = () if spilled is None else spilled.pages
        for number in page_numbers:
            if number not in gone and blocks[number].ref_cnt == 1:
                yield number

    def take_slot(self, request: Request) -> Spilled:
        """Gives a request a slot, and hot blocks of the pool.

        Taking blocks may release clean pages, of other requests.
        """
        spilled = Spilled(request, self._free_slots.pop())
        self.spilled[request.request_id] = spilled
        if self._num_hot_blocks:
            spilled.hot_blocks = self._pool.get_new_blocks(self._num_hot_blocks)
        hot_blocks = tuple(block.block_id for block in spilled.hot_blocks)
        self._orders.commands.append(StartSlot(spilled.slot, hot_blocks))
        self._set_tail(spilled, request.num_computed_tokens)
        return spilled

    def take_index_block(self, spilled: Spilled) -> None:
        """Gives a request a block of the pool for entries.

        Taking it may release clean pages, this request's too.
        """
        (block,) = self._pool.get_new_blocks(1)
        spilled.index_blocks.append(block)
        # Taken from the end.
        spilled.free_entries.extend(
            IndexEntry(block.block_id, number)
            for number in reversed(range(self._entries_per_block))
        )

    def start_copy(self, spilled: Spilled, page_number: int) -> None:
        """Orders the copy of one of ``own_pages``, to a free host page and entry."""
        block = self._manager.req_to_blocks[spilled.request.request_id][page_number]
        # The request's own reference holds the block until the copy is done.
        page = Page(block, self._free_host_pages.pop(), spilled.free_entries.pop())
        spilled.pages[page_number] = page
        number = self._next_transfer
        self._next_transfer += 1
        self._copies[number] = _Copy(spilled, page_number, page)
        self._orders.transfers.append(
            Transfer(number, block.block_id, page.host_page, page.entry)
        )

    def move_tails(self, num_scheduled_tokens: dict[str, int]) -> None:
        """Tells where a step's tokens go, of requests that begin a new block.

        Args:
            num_scheduled_tokens: Of the step, by request.
        """
        for request_id, spilled in self.spilled.items():
            # With asynchronous scheduling these include the step in flight; the
            # token of this step comes behind all of them.
            num_computed = spilled.request.num_computed_tokens
            if num_computed >= spilled.tail_end and request_id in num_scheduled_tokens:
                self._set_tail(spilled, num_computed)

    def take_orders(self) -> Orders:
        """What workers have to know and do of all that happened since the last call."""
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

    def end(self, request_id: str) -> None:
        """A request finished, was aborted or is preempted: gives back all it holds."""
        spilled = self.spilled.pop(request_id, None)
        if spilled is None:
            return
        spilled.ended = True
        self._orders.commands.append(ClearSlot(spilled.slot))
        self._free_slots.append(spilled.slot)
        for page_number, page in spilled.pages.items():
            if page.state is PageState.COPYING:
                # Its host page is free when no rank can be writing there any more.
                # The blocks need not wait: what is copied from them from now on, no
                # one reads.
                self._num_late_copies += 1
                continue
            self._free_host_pages.append(page.host_page)
            if page.state is PageState.RELEASED:
                self._num_released -= 1
                continue
            self._num_clean -= 1
            owners = self._owners[page.block.block_id]
            owners.remove((spilled, page_number))
            if not owners:
                del self._owners[page.block.block_id]
        self._pool.free_blocks(spilled.index_blocks)
        self._pool.free_blocks(spilled.hot_blocks)

    def _set_tail(self, spilled: Spilled, num_computed: int) -> None:
        tail = num_computed // self._block_size
        blocks = self._manager.req_to_blocks[spilled.request.request_id]
        self._orders.commands.append(SetTail(spilled.slot, blocks[tail].block_id))
        spilled.tail_end = (tail + 1) * self._block_size

    def _unpin(self, copy: _Copy) -> None:
        """Gives a copied page's block back to the pool, to be read until reused."""
        spilled, page = copy.owner, copy.page
        blocks = self._manager.req_to_blocks[spilled.request.request_id]
        assert blocks[copy.page_number] is page.block
        blocks[copy.page_number] = self._manager._null_block
        page.state = PageState.CLEAN
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
            page.state = PageState.RELEASED
            self._orders.commands.append(
                Release(spilled.slot, page_number, page.host_page, page.entry)
            )
        self._num_clean -= len(owners)
        self._num_released += len(owners)
        self._total_released += len(owners)
        self._orders.reused_blocks.append(block.block_id)
