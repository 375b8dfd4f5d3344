# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Layers whose pages are in host memory, and hot blocks in a state of one's choice."""

from dataclasses import dataclass

import torch
from gpu_layers import Case, Layers

from vllm_clusterkv import backend, ops
from vllm_clusterkv.page_layout import (
    BLOCK_SIZE,
    COUNTERS,
    INDEX_UNIT,
    LINE_ROWS,
    LINES_PER_PAGE,
)


def host_pages_a_row(case: Case) -> int:
    """Pages of a row that can be on the host: not its first, and not its tail."""
    return case.num_indexed - 1


def host_layer_bytes(case: Case) -> int:
    """Bytes of a layer's pages on the host."""
    return case.batch_size * host_pages_a_row(case) * case.layout.kv_bytes


def line_bytes(case: Case) -> int:
    """Bytes that one line brings: rows of a KV head, keys and values."""
    return LINE_ROWS * 2 * case.shape.head_size * case.shape.dtype.itemsize


@dataclass
class HotState:
    """What ``recall`` keeps of a layer, as ``ops.py`` has it."""

    line_table: torch.Tensor
    hot_lines: torch.Tensor
    hot_order: torch.Tensor


class SpilledLayers:
    """The host tier of ``Layers``: each row has a slot and all pages that it can there.

    A page's index stays behind the block that the page has left. The rows of the first
    blocks so left are the slot's hot blocks. The pool is laid out as the worker's, a
    page's layers side by side, with the pages of all rows in random order.
    """

    def __init__(
        self, layers: Layers, pool: torch.Tensor, num_hot_blocks: int, seed: int = 0
    ):
        """Copies the pages to the host.

        Args:
            layers: Whose pages are complete where their blocks are.
            pool: Elements of the model's dtype in host memory, pinned for CUDA, enough
                for ``host_layer_bytes`` of each layer.
            num_hot_blocks: Of each row.
            seed: Of the order of pages on the host and of states.
        """
        self.layers, case = layers, layers.case
        device = layers.block_table.device
        self._generator = torch.Generator(device).manual_seed(seed)
        batch, num_pages = case.batch_size, host_pages_a_row(case)
        if num_hot_blocks > num_pages:
            raise SystemExit(
                f"{num_hot_blocks} hot blocks are more than the {num_pages} pages of a "
                "row that are on the host"
            )
        heads, row = case.shape.num_kv_heads, 2 * case.shape.head_size
        shape = (batch * num_pages, len(layers), heads, BLOCK_SIZE, row)
        self._pool = pool[: torch.Size(shape).numel()].view(shape)
        # [batch_size, num_pages]
        self._host_pages = torch.randperm(
            batch * num_pages, generator=self._generator, device=device
        ).view(batch, num_pages)
        self._on_host = slice(1, 1 + num_pages)
        blocks = layers.block_table
        left = blocks[:, self._on_host]
        for host_page, block in zip(
            self._host_pages.flatten().tolist(), left.flatten().tolist(), strict=True
        ):
            # All layers hold the same.
            rows = layers.pages[0].kv_cache[block].expand(len(layers), -1, -1, -1)
            self._pool[host_page].copy_(rows)
        index_table = blocks * (case.layout.page_bytes // INDEX_UNIT)
        slots = torch.arange(batch, dtype=torch.int32, device=device)
        self.no_slot = backend.DecodeMetadata(
            *layers.rows(layers.all_sparse), index_table, torch.full_like(slots, -1)
        )
        table = blocks.clone()
        table[:, self._on_host] = (-1 - self._host_pages).int()
        self.on_host = backend.DecodeMetadata(
            table, *layers.rows(layers.all_sparse)[1:], index_table, slots
        )
        self._hot_blocks = left[:, :num_hot_blocks].contiguous()
        positions = num_hot_blocks * LINES_PER_PAGE

        def new(*shape: int, fill: int = -1, dtype=torch.int32) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self._state = HotState(
            new(len(layers), batch * num_pages, heads, LINES_PER_PAGE),
            new(len(layers), batch, heads, positions),
            new(len(layers), batch, heads, positions),
        )
        # Not read: no row has the length at which one is looked at for its mass.
        self._scores = torch.zeros(
            batch, case.shape.num_heads, blocks.shape[1] * case.config.num_clusters
        ).to(device)
        self._counters = new(len(COUNTERS), fill=0, dtype=torch.int64)
        self.pages = [self._pages(i, self._hot_blocks) for i in range(len(layers))]
        # Without hot blocks, nothing is recalled.
        no_blocks = new(batch, 0)
        self.bare_pages = [self._pages(i, no_blocks) for i in range(len(layers))]

    def decode(
        self,
        layer_idx: int,
        metadata: backend.DecodeMetadata,
        pages: list[backend.HostPages],
        output: torch.Tensor,
    ) -> None:
        """The attention of a layer as the backend computes it with a host tier.

        Args:
            layer_idx: Which.
            metadata: ``no_slot`` or ``on_host``.
            pages: ``pages`` or ``bare_pages``.
            output: [batch_size, num_heads, head_size]. Written.
        """
        layers = self.layers
        backend.decode(
            "layer",
            layers.query,
            layers.pages[layer_idx],
            metadata,
            layers.case.scale,
            layers.case.config,
            layers.scratch,
            output,
            pages[layer_idx],
        )

    def recall(self, layer_idx: int, selected: torch.Tensor) -> None:
        """The op alone."""
        layers, pages, rows = self.layers, self.pages[layer_idx], self.on_host
        assert rows.index_table is not None and rows.row_slots is not None
        ops.recall(
            selected,
            self._scores,
            *layers.index(layer_idx),
            rows.block_table,
            rows.seq_lens,
            rows.min_sparse_lens,
            layers.case.config.num_sink_tokens,
            rows.index_table,
            pages.host_cache,
            rows.row_slots,
            pages.hot_blocks,
            pages.line_table,
            pages.hot_lines,
            pages.hot_order,
            pages.counters,
        )

    def put(self, state: HotState) -> None:
        """Sets the state of all layers to one. Rows in hot blocks stay as they are."""
        for name, tensor in vars(self._state).items():
            tensor.copy_(getattr(state, name))

    def count(self, selected: torch.Tensor) -> tuple[int, int, int]:
        """Lines that ``recall`` finds, recalls and leaves in the first layer."""
        self._counters.zero_()
        self.recall(0, selected)
        found, recalled, left = self._counters[:3].tolist()
        return found, recalled, left

    def empty_state(self) -> HotState:
        """Of slots that are new."""
        lines = torch.full_like(self._state.hot_lines[0], -1)
        order = torch.arange(lines.shape[-1], device=lines.device).int()
        return HotState(
            torch.full_like(self._state.line_table[0], -1),
            lines,
            order.expand_as(lines).contiguous(),
        )

    def state(self, needed: torch.Tensor, miss_share: float) -> HotState:
        """Full hot blocks that lack a share of the lines which a step needs.

        The others of these lines are there and were used last. Before them come lines
        that the step does not need, all at random.

        Args:
            needed: [batch_size, num_kv_heads, lines of a row] bool.
            miss_share: Of each row and KV head, rounded to lines.
        """
        state = self.empty_state()
        order = torch.rand(
            needed.shape, generator=self._generator, device=needed.device
        )
        # Needed lines by chance, of which the first are missing.
        rank = torch.where(needed, order, 2.0).argsort(-1).argsort(-1)
        num_missing = (miss_share * needed.sum(-1, keepdim=True)).round()
        kept = needed & (rank >= num_missing)
        pages = torch.arange(needed.shape[-1], device=needed.device) // LINES_PER_PAGE
        on_host = (pages >= self._on_host.start) & (pages < self._on_host.stop)
        order = torch.where(kept, order + 2, order)
        order = torch.where((needed & ~kept) | ~on_host, -1.0, order)
        found, lines = order.topk(state.hot_lines.shape[-1], dim=-1)
        state.hot_lines.copy_(torch.where(found >= 0, lines, -1))
        state.hot_order.copy_(state.hot_order.flip(-1))
        reqs, heads, positions = (state.hot_lines >= 0).nonzero(as_tuple=True)
        held = state.hot_lines[reqs, heads, positions].long()
        page, line = held // LINES_PER_PAGE, held % LINES_PER_PAGE
        host_pages = self._host_pages[reqs, page - self._on_host.start]
        blocks = self._hot_blocks[reqs, positions // LINES_PER_PAGE]
        places = blocks * LINES_PER_PAGE + positions % LINES_PER_PAGE
        state.line_table[host_pages, heads, line] = places.int()
        return state

    def needed_lines(self, selected: torch.Tensor) -> torch.Tensor:
        """[batch_size, num_kv_heads, lines of a row] bool, of a selection.

        Raises:
            SystemExit: The hot blocks do not hold them.
        """
        self.put(self.empty_state())
        _, _, left = self.count(selected)
        if left:
            raise SystemExit(f"the hot blocks lack room for {left} lines of one step")
        held = self._state.hot_lines[0].long()
        num_lines = self.layers.case.num_pages * LINES_PER_PAGE
        needed = held.new_zeros(*held.shape[:2], num_lines + 1, dtype=torch.bool)
        # Positions that hold nothing mark the last, which is no line.
        needed.scatter_(-1, torch.where(held >= 0, held, num_lines), True)
        return needed[..., :num_lines]

    def _pages(self, layer_idx: int, hot_blocks: torch.Tensor) -> backend.HostPages:
        state = self._state
        return backend.HostPages(
            self._pool[:, layer_idx],
            hot_blocks,
            state.line_table[layer_idx],
            state.hot_lines[layer_idx],
            state.hot_order[layer_idx],
            self._counters,
        )
