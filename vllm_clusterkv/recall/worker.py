# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The worker half of the host tier: copies of pages, and tables that lead to them.

vLLM's block tables still name the blocks of pages that have left the GPU, and a batch
does not say which request a row is. What tells is the block that receives the row's
current token: it belongs to one running request alone. So ``resolve`` finds a row's
slot by its tail block, and puts the slot's released pages in place of stale blocks.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from vllm_clusterkv import requirements
from vllm_clusterkv.backend import DecodeMetadata, HostPages
from vllm_clusterkv.page_layout import (
    BLOCK_SIZE,
    COUNTERS,
    INDEX_UNIT,
    LINE_ROWS,
    LINES_PER_PAGE,
    MASS_UNIT,
    PageLayout,
)
from vllm_clusterkv.recall import host_memory
from vllm_clusterkv.recall.messages import (
    ClearSlot,
    Command,
    Orders,
    Release,
    SetTail,
    StartSlot,
    Transfer,
)

logger = init_logger("vllm.clusterkv")

_SPARE_BYTES = 256 << 20
"""For the copies' buffers and what graphs allocate for ``resolve``."""

STEPS_PER_COUNT = 8
"""Steps from one look at the counters to the next."""

POISON_WORD = -1
"""Its bytes are NaN in every float dtype, and -1 as a cluster's end."""

POISON_ROW = 1e4
"""What keys and values are filled with on GPUs: FlashAttention multiplies by zero what
it masks, so there they must be finite."""


class HostTier:
    """Of one worker.

    Attributes:
        pool: [num_host_pages, num_layers, num_kv_heads, BLOCK_SIZE, 2 * head_size] of
            the model's dtype, on the CPU; pinned, if the KV cache is on a GPU.
    """

    def __init__(
        self,
        layout: PageLayout,
        kv_caches: dict[str, torch.Tensor],
        num_host_pages: int,
        max_slots: int,
        max_blocks: int,
        num_hot_blocks: int = 0,
        poison_released: bool = False,
    ) -> None:
        """Allocates the pool and the tables.

        Args:
            layout: Of the layers, which are all alike.
            kv_caches: By layer name, [num_blocks, num_kv_heads, BLOCK_SIZE,
                2 * head_size], vLLM's views.
            num_host_pages: Pages that the pool holds.
            max_slots: Requests that have pages in it at once.
            max_blocks: Pages of the longest request.
            num_hot_blocks: For what is recalled for a request.
            poison_released: Fill released blocks with NaN as they get a new owner.
        """
        self._layout = layout
        self._layer_numbers = {name: i for i, name in enumerate(kv_caches)}
        self._first_layer = min(kv_caches, key=extract_layer_index)
        caches = list(kv_caches.values())
        for cache in caches:
            layout.index_view(cache)  # raises where the layer is not of this layout
        self._block_bytes = caches[0].stride(0) * caches[0].element_size()
        if self._block_bytes % INDEX_UNIT:
            raise ValueError(
                f"blocks must be of a multiple of {INDEX_UNIT} bytes, "
                f"got {self._block_bytes}"
            )
        self._spans = _join_layers(caches, layout.page_bytes)
        self._caches = caches
        self._poison_released = poison_released
        device = caches[0].device
        self._is_cuda = device.type == "cuda"
        # Rows are copied beside the steps' kernels.
        self._copy_stream = torch.cuda.Stream(device) if self._is_cuda else None
        self._under_way: deque[tuple[torch.cuda.Event, list[int]]] = deque()
        self._tail_blocks = torch.full((max_slots,), -1, dtype=torch.int32).to(device)
        table = torch.full((max_slots, max_blocks), -1, dtype=torch.int32)
        self._host_pages = table.to(
            device
        )  # of slots' pages; -1 for those with a block
        self._places = table.clone().to(device)  # of their indexes
        # Of each layer what decode recalled: ops.py has shapes and meaning.
        num_layers, num_heads = len(caches), layout.num_kv_heads
        num_positions = num_hot_blocks * LINES_PER_PAGE
        hot_pages = num_host_pages if num_hot_blocks else 0
        if self._is_cuda:
            lines = 2 * max_slots * num_positions + hot_pages * LINES_PER_PAGE
            _check_room(device, 4 * num_layers * num_heads * lines, num_hot_blocks)

        def new(*shape: int, fill: int = -1, dtype=torch.int32) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        shape = (num_layers, max_slots, num_heads, num_positions)
        self._hot_blocks = new(max_slots, num_hot_blocks)
        self._hot_lines = new(*shape)
        self._hot_order = (
            torch.arange(num_positions, device=device).int().repeat(*shape[:-1], 1)
        )
        self._line_table = new(num_layers, hot_pages, num_heads, LINES_PER_PAGE)
        self._counters = new(num_layers, len(COUNTERS), fill=0, dtype=torch.int64)
        self._counts: torch.Tensor | None = None
        self._taken = [0] * len(COUNTERS)
        self._steps = 0
        self._completed: list[int] = []
        self._resolved: DecodeMetadata | None = None
        # Last: it is to be given back, and nothing fails behind it.
        self.pool = host_memory.allocate(
            (
                num_host_pages,
                len(caches),
                layout.num_kv_heads,
                BLOCK_SIZE,
                2 * layout.head_size,
            ),
            layout.dtype,
            pinned=self._is_cuda,
        )
        # [num_host_pages, num_layers, words of keys and values]
        self._pool_words = self.pool.view(num_host_pages, len(caches), -1).view(_WORD)

    def apply(self, orders: Orders) -> None:
        """Does what the scheduler wants before this step's forward."""
        for command in orders.commands:
            self._change_tables(command)
        # Before copies: a block that lost its page may be one that gets entries.
        if self._poison_released:
            for block in orders.reused_blocks:
                self._poison(block)
        if not orders.transfers:
            return
        # With the steps' kernels: the block of entries may get another owner as soon as
        # the request has ended.
        for transfer in orders.transfers:
            self._copy_index(transfer)
        numbers = [transfer.number for transfer in orders.transfers]
        if self._copy_stream is None:
            for transfer in orders.transfers:
                self._copy_rows(transfer)
            self._completed.extend(numbers)
            return
        # A host page may have belonged to a request that the last step still read.
        self._copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copy_stream):
            for transfer in orders.transfers:
                self._copy_rows(transfer)
            event = torch.cuda.Event()
            event.record()
        self._under_way.append((event, numbers))

    def take_completed(self) -> list[int]:
        """Transfers completed since the last call."""
        while self._under_way and self._under_way[0][0].query():
            self._completed.extend(self._under_way.popleft()[1])
        completed, self._completed = self._completed, []
        return completed

    def close(self) -> None:
        """Gives the memory back, behind all copies."""
        try:
            if self._copy_stream is not None:
                torch.cuda.synchronize(self._copy_stream.device)
        finally:
            host_memory.release(self.pool, pinned=self._is_cuda)

    def resolve(self, layer_name: str, rows: DecodeMetadata) -> DecodeMetadata:
        """Decode rows with tables that lead to where their pages are.

        The first layer of a step makes them, and the others get them. (Not the first
        that asks with these rows: a CUDA graph is captured with rows that a dry run
        has asked with.)

        Args:
            layer_name: That asks. Layers run in their order.
            rows: As the batch has them.

        Returns:
            With an ``index_table``, and with ``-1 - h`` for host pages in
            ``block_table``.
        """
        if layer_name == self._first_layer:
            self._resolved = self._resolve(rows)
        assert self._resolved is not None and self._resolved.source is rows
        return self._resolved

    def _resolve(self, rows: DecodeMetadata) -> DecodeMetadata:
        blocks, seq_lens = rows.block_table, rows.seq_lens
        # vLLM's table may be wider than the longest request.
        width = min(blocks.shape[1], self._host_pages.shape[1])
        tail_page = (seq_lens.long() - 1).clamp_min(0) // BLOCK_SIZE
        tails = blocks.gather(1, tail_page[:, None])
        # A padding row may show any block.
        is_slots = (tails == self._tail_blocks) & (seq_lens > 0)[:, None]
        slots = is_slots.int().argmax(1)
        host_pages = self._host_pages[slots, :width]
        on_host = (host_pages >= 0) & is_slots.any(1, keepdim=True)
        blocks = blocks[:, :width]
        places = blocks * (self._block_bytes // INDEX_UNIT)
        return DecodeMetadata(
            torch.where(on_host, -1 - host_pages, blocks),
            seq_lens,
            rows.min_sparse_lens,
            torch.where(on_host, self._places[slots, :width], places),
            torch.where(is_slots.any(1), slots, -1).int(),
            source=rows,
        )

    def host_pages(self, layer_name: str) -> HostPages:
        """Of one layer."""
        number = self._layer_numbers[layer_name]
        return HostPages(
            self.pool[:, number],
            self._hot_blocks,
            self._line_table[number],
            self._hot_lines[number],
            self._hot_order[number],
            self._counters[number],
        )

    def counters(self) -> torch.Tensor:
        """[len(COUNTERS)] int64 on the device: counted by ``recall`` in all layers."""
        return self._counters.sum(0)

    def take_counts(self) -> dict[str, float] | None:
        """What ``recall`` counted since it was last taken.

        On a GPU it comes some steps late: nobody waits for it.

        Returns:
            By name, as ``RecallStats`` has it, or None if it is not time.
        """
        self._steps += 1
        if self._steps % STEPS_PER_COUNT:
            return None
        if self._counts is None:
            # Pinned, on GPUs, so that the copy is asynchronous.
            self._counts = torch.zeros(
                len(COUNTERS), dtype=torch.int64, pin_memory=self._is_cuda
            )
        if not self._is_cuda:
            self._counts.copy_(self.counters())
        now = self._counts.tolist()
        grown: dict[str, float] = {
            name: n - before
            for name, n, before in zip(COUNTERS, now, self._taken, strict=True)
        }
        self._taken = now
        if self._is_cuda:
            self._counts.copy_(self.counters(), non_blocking=True)
        if not any(grown.values()):
            return None
        row_bytes = 2 * self._layout.head_size * self._layout.dtype.itemsize
        grown["recalled_bytes"] = grown["recalled"] * LINE_ROWS * row_bytes
        grown["recall_seconds"] = 1e-9 * grown.pop("nanoseconds")
        grown["mass"] *= MASS_UNIT
        return grown

    def _change_tables(self, command: Command) -> None:
        match command:
            case StartSlot(slot, hot_blocks):
                self._clear(slot)
                if hot_blocks:
                    # From pinned memory, on GPUs: nobody waits for the copy.
                    blocks = torch.tensor(
                        hot_blocks, dtype=torch.int32, pin_memory=self._is_cuda
                    )
                    self._hot_blocks[slot].copy_(blocks, non_blocking=True)
                    self._hot_lines[:, slot] = -1
            case ClearSlot(slot):
                self._clear(slot)
            case SetTail(slot, block):
                self._tail_blocks[slot] = block
            case Release(slot, page, host_page, entry):
                self._host_pages[slot, page] = host_page
                self._places[slot, page] = self._layout.index_place(
                    self._block_bytes, entry.block, entry.number
                )

    def _clear(self, slot: int) -> None:
        self._tail_blocks[slot] = -1
        self._host_pages[slot] = -1

    def _copy_index(self, transfer: Transfer) -> None:
        start = transfer.entry.number * self._layout.entry_bytes // _WORD_BYTES
        kv_size = self._layout.kv_bytes // _WORD_BYTES
        # Without the padding. One day this block holds rows again, and those that are
        # masked FlashAttention multiplies by zero: all that it finds must be finite.
        size = -(-self._layout.used_bytes // _WORD_BYTES) - kv_size
        # Nothing of it is hot, whosever lines those of the host page were before.
        self._line_table[:, transfer.host_page : transfer.host_page + 1] = -1
        for span in self._spans:
            index = span.words[:, transfer.block, kv_size : kv_size + size]
            span.words[:, transfer.entry.block, start : start + size] = index

    def _copy_rows(self, transfer: Transfer) -> None:
        size = self._layout.kv_bytes // _WORD_BYTES
        for span in self._spans:
            rows = self._pool_words[transfer.host_page, span.layers]
            rows.copy_(span.words[:, transfer.block, :size], non_blocking=True)

    def _poison(self, block: int) -> None:
        for span in self._spans:
            span.words[:, block] = POISON_WORD
        if self._is_cuda:
            for cache in self._caches:
                cache[block] = POISON_ROW


_WORD = torch.int64
_WORD_BYTES = 8


@dataclass
class _Span:
    """Layers whose pages are evenly spaced in memory: one copy moves a page of all."""

    words: torch.Tensor  # [num_layers, num_blocks, words of a page], with padding
    layers: slice


def _join_layers(caches: list[torch.Tensor], page_bytes: int) -> list[_Span]:
    """One span for all layers where vLLM has put them so, or one for each.

    Args:
        caches: As ``HostTier`` has them, in its order.
        page_bytes: Of a block, its index included.
    """
    starts = [cache.data_ptr() for cache in caches]
    steps = {after - before for before, after in pairwise(starts)}
    storages = {cache.untyped_storage().data_ptr() for cache in caches}
    if len(steps) == len(storages) == 1 and min(steps) > 0:
        spans, step = [slice(0, len(caches))], steps.pop()
    else:
        spans, step = [slice(i, i + 1) for i in range(len(caches))], 0
    return [
        _Span(_words_of_pages(caches[layers], step, page_bytes), layers)
        for layers in spans
    ]


def _words_of_pages(
    caches: list[torch.Tensor], step: int, page_bytes: int
) -> torch.Tensor:
    """[layers, blocks, words of a page] over layers that lie ``step`` bytes apart."""
    cache = caches[0]
    size = cache.element_size()
    everything = torch.empty(0, dtype=_WORD, device=cache.device)
    return everything.set_(
        cache.untyped_storage(),
        cache.storage_offset() * size // _WORD_BYTES,
        (len(caches), cache.shape[0], page_bytes // _WORD_BYTES),
        (step // _WORD_BYTES, cache.stride(0) * size // _WORD_BYTES, 1),
    )


_MAX_POSITIONS = 10_000
"""Lines of a slot: ``recall`` needs 8 bytes of shared memory for each, and 4 a page of
the row; the least that a GPU has is 99 KiB."""


def _check_room(device: torch.device, num_bytes: int, num_hot_blocks: int) -> None:
    """Refuses tables that do not fit the device, whose memory vLLM has given away.

    Raises:
        ValueError: There is less.
    """
    if num_hot_blocks * LINES_PER_PAGE > _MAX_POSITIONS:
        most = _MAX_POSITIONS // LINES_PER_PAGE * BLOCK_SIZE
        raise requirements.refusal(
            f"clusterkv.hot_cache_tokens must be at most {most} on a GPU, "
            f"got {num_hot_blocks * BLOCK_SIZE}",
            "lower it",
        )
    free, _ = torch.cuda.mem_get_info(device)
    logger.info("CLUSTERKV host tier: tables of %d MiB.", num_bytes >> 20)
    if num_bytes > free - _SPARE_BYTES:
        raise requirements.refusal(
            f"clusterkv.host_memory_gib needs tables of {num_bytes >> 20} MiB on the "
            f"GPU, of which {free >> 20} MiB are free, and {_SPARE_BYTES >> 20} MiB "
            "beside them",
            "lower --gpu-memory-utilization, --max-num-seqs or "
            "clusterkv.hot_cache_tokens",
        )


def page_count(host_memory_gib: float, layout: PageLayout, num_layers: int) -> int:
    """Pages that fit so much memory: keys and values of all layers of a rank."""
    return int(host_memory_gib * 2**30) // (num_layers * layout.kv_bytes)


_tiers: dict[str, HostTier] = {}


def register_layers(layer_names: Iterable[str], tier: HostTier | None) -> None:
    """Makes a tier that of some layers of this process; None for none."""
    for name in layer_names:
        if tier is None:
            _tiers.pop(name, None)
        else:
            _tiers[name] = tier


def tier_of(layer_name: str) -> HostTier | None:
    """A layer's host tier."""
    return _tiers.get(layer_name)
