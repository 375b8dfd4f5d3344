# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The worker half of the host tier: copies of pages, and tables that lead to them.

vLLM's block tables still name the blocks of pages that have left the GPU, and a batch
does not say which request a row is. What tells is the block that receives the row's
current token: it belongs to one running request alone. So ``resolve`` finds a row's
slot by its tail block, and puts the slot's released pages in place of stale blocks.
"""

from collections.abc import Iterable

import torch

from vllm_clusterkv.backend import DecodeMetadata
from vllm_clusterkv.page_layout import BLOCK_SIZE, INDEX_UNIT, PageLayout
from vllm_clusterkv.recall.messages import (
    ClearSlot,
    Command,
    Orders,
    Release,
    SetTail,
    StartSlot,
    Transfer,
)

POISON_BYTE = 0xFF
"""Bytes of it are NaN in every float dtype, and -1 as a cluster's end."""


class HostTier:
    """Of one worker.

    Attributes:
        pool: [num_host_pages, num_layers, num_kv_heads, BLOCK_SIZE, 2 * head_size] of
            the model's dtype, on the CPU.
    """

    def __init__(
        self,
        layout: PageLayout,
        kv_caches: dict[str, torch.Tensor],
        num_host_pages: int,
        max_slots: int,
        max_blocks: int,
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
            poison_released: Fill released blocks with NaN as they get a new owner.
        """
        self._layout = layout
        self._layer_numbers = {name: i for i, name in enumerate(kv_caches)}
        caches = list(kv_caches.values())
        self._block_bytes = caches[0].stride(0) * caches[0].element_size()
        self._blocks = [_bytes_of_blocks(cache, layout.page_bytes) for cache in caches]
        self._caches = caches
        self._poison_released = poison_released
        # Zeros: pages of memory are there when they are needed, not when first written.
        self.pool = torch.zeros(
            (
                num_host_pages,
                len(caches),
                layout.num_kv_heads,
                BLOCK_SIZE,
                2 * layout.head_size,
            ),
            dtype=layout.dtype,
        )
        device = caches[0].device
        self._tail_blocks = torch.full((max_slots,), -1, dtype=torch.int32).to(device)
        table = torch.full((max_slots, max_blocks), -1, dtype=torch.int32)
        self._host_pages = table.to(
            device
        )  # of slots' pages; -1 for those with a block
        self._places = table.clone().to(device)  # of their indexes
        self._completed: list[int] = []
        self._resolved: DecodeMetadata | None = None

    def apply(self, orders: Orders) -> None:
        """Does what the scheduler wants before this step's forward."""
        for command in orders.commands:
            self._change_tables(command)
        # Before copies: a block that lost its page may be one that gets entries.
        if self._poison_released:
            for block in orders.reused_blocks:
                for blocks in self._blocks:
                    blocks[block] = POISON_BYTE
        for transfer in orders.transfers:
            self._copy(transfer)
            self._completed.append(transfer.number)

    def take_completed(self) -> list[int]:
        """Transfers completed since the last call."""
        completed, self._completed = self._completed, []
        return completed

    def resolve(self, rows: DecodeMetadata) -> DecodeMetadata:
        """Decode rows with tables that lead to where their pages are.

        Layers of a step ask with the same object, and get the same one.

        Args:
            rows: As the batch has them.

        Returns:
            With an ``index_table``, and with ``-1 - h`` for host pages in
            ``block_table``.
        """
        if self._resolved is None or self._resolved.source is not rows:
            self._resolved = self._resolve(rows)
        return self._resolved

    def _resolve(self, rows: DecodeMetadata) -> DecodeMetadata:
        blocks, seq_lens = rows.block_table, rows.seq_lens
        tail_page = (seq_lens.long() - 1).clamp_min(0) // BLOCK_SIZE
        tails = blocks.gather(1, tail_page[:, None])
        # A padding row may show any block.
        is_slots = (tails == self._tail_blocks) & (seq_lens > 0)[:, None]
        slots = is_slots.int().argmax(1)
        width = blocks.shape[1]
        host_pages = self._host_pages[slots, :width]
        on_host = (host_pages >= 0) & is_slots.any(1, keepdim=True)
        places = blocks * (self._block_bytes // INDEX_UNIT)
        return DecodeMetadata(
            torch.where(on_host, -1 - host_pages, blocks),
            seq_lens,
            rows.min_sparse_lens,
            torch.where(on_host, self._places[slots, :width], places),
            source=rows,
        )

    def host_cache(self, layer_name: str) -> torch.Tensor:
        """A layer's: [num_host_pages, num_kv_heads, BLOCK_SIZE, 2 * head_size]."""
        return self.pool[:, self._layer_numbers[layer_name]]

    def _change_tables(self, command: Command) -> None:
        match command:
            case StartSlot(slot) | ClearSlot(slot):
                self._tail_blocks[slot] = -1
                self._host_pages[slot] = -1
            case SetTail(slot, block):
                self._tail_blocks[slot] = block
            case Release(slot, page, host_page, entry):
                self._host_pages[slot, page] = host_page
                self._places[slot, page] = self._layout.index_place(
                    self._block_bytes, entry.block, entry.number
                )

    def _copy(self, transfer: Transfer) -> None:
        size, kv_bytes = self._layout.entry_bytes, self._layout.kv_bytes
        start = transfer.entry.number * size
        for i, (cache, blocks) in enumerate(
            zip(self._caches, self._blocks, strict=True)
        ):
            index = blocks[transfer.block, kv_bytes:]
            blocks[transfer.entry.block, start : start + size] = index
            self.pool[transfer.host_page, i] = cache[transfer.block]


def _bytes_of_blocks(kv_cache: torch.Tensor, page_bytes: int) -> torch.Tensor:
    """[num_blocks, page_bytes] uint8 over a layer's pages, indexes and padding too."""
    size = kv_cache.element_size()
    everything = torch.empty(0, dtype=torch.uint8, device=kv_cache.device)
    return everything.set_(
        kv_cache.untyped_storage(),
        kv_cache.storage_offset() * size,
        (kv_cache.shape[0], page_bytes),
        (kv_cache.stride(0) * size, 1),
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
