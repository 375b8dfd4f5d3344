# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""KV caches of several layers as vLLM lays them out, filled and indexed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from traffic import Load, Shape

from vllm_clusterkv import backend, ops
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout

INT32_MAX = 2**31 - 1
_TOKENS_A_TOPIC = 8
_NUM_TOPICS = 64
_PAGES_AT_ONCE = 256
CPU_NUM_SCORE_PARTS, CPU_NUM_SPLITS = 16, 8
MAX_SCRATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Case:
    """A batch of decode rows over one layer.

    ``context_len`` is the rows' length with the current token, so that their tail page
    is full: the most that a sparse row attends to beside its budget.
    """

    shape: Shape
    context_len: int
    batch_size: int
    config: ClusterKVConfig
    max_model_len: int
    num_score_parts: int
    num_splits: int

    @property
    def num_pages(self) -> int:
        """Pages of one row."""
        return -(-self.context_len // BLOCK_SIZE)

    @property
    def num_indexed(self) -> int:
        """Indexed pages of one row."""
        return (self.context_len - 1) // BLOCK_SIZE

    @property
    def layout(self) -> PageLayout:
        shape = self.shape
        return PageLayout(
            shape.num_kv_heads, shape.head_size, shape.num_clusters, shape.dtype
        )

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's pool."""
        return self.batch_size * self.num_pages * self.layout.page_bytes

    @property
    def scale(self) -> float:
        return self.shape.head_size**-0.5


class Layers:
    """Pools of padded pages, one a layer, and the decode rows over them.

    As in vLLM, a block has the same number in every layer, and the block table is as
    wide as ``max_model_len`` needs. All layers hold the same keys and values, in memory
    of their own.
    """

    def __init__(self, case: Case, num_layers: int, device: str, seed: int = 0):
        self.case = case
        shape, layout = case.shape, case.layout
        generator = torch.Generator(device).manual_seed(seed)
        num_blocks = case.batch_size * case.num_pages
        # [num_layers, num_blocks, page_bytes]
        self.buffer = torch.zeros(
            num_layers, num_blocks, layout.page_bytes, dtype=torch.int8, device=device
        )
        self.all_pages = self._views(self.buffer.flatten(0, 1))  # of all layers
        self.pages = [self._views(layer_buffer) for layer_buffer in self.buffer]
        blocks = torch.randperm(num_blocks, generator=generator, device=device)
        max_blocks = max(-(-case.max_model_len // BLOCK_SIZE), case.num_pages)
        # [batch_size, max_blocks]
        self.block_table = torch.zeros(
            case.batch_size, max_blocks, dtype=torch.int32, device=device
        )
        self.block_table[:, : case.num_pages] = blocks.view(case.batch_size, -1)
        rows = (case.batch_size,)
        self.seq_lens = torch.full(
            rows, case.context_len, dtype=torch.int32, device=device
        )
        self.all_sparse = torch.zeros_like(self.seq_lens)
        self.all_dense = torch.full_like(self.seq_lens, INT32_MAX)
        self.scratch = make_scratch(case, max_blocks, device)
        # [batch_size, num_heads, head_size]
        self.query = torch.randn(
            case.batch_size,
            shape.num_heads,
            shape.head_size,
            generator=generator,
            device=device,
        ).to(shape.dtype)
        self._fill(generator)
        self._index()
        for layer_buffer in self.buffer[1:]:
            layer_buffer.copy_(self.buffer[0])

    def __len__(self) -> int:
        return len(self.pages)

    def index(self, layer_idx: int) -> tuple[torch.Tensor, ...]:
        """What all ops take of a layer: kv_cache and index."""
        pages = self.pages[layer_idx]
        return pages.kv_cache, pages.index

    def indexed_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``block_ids`` and ``num_sink_tokens`` of a layer's indexed pages."""
        blocks = self.block_table[:, : self.case.num_indexed]
        sinks = torch.zeros_like(blocks)
        sinks[:, :1] = self.case.config.num_sink_tokens
        return blocks.flatten().contiguous(), sinks.flatten()

    def rows(
        self, min_sparse_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the ops take of the batch."""
        return self.block_table, self.seq_lens, min_sparse_lens

    def decode(
        self, layer_idx: int, min_sparse_lens: torch.Tensor, output: torch.Tensor
    ) -> None:
        """The attention of a layer as the backend computes it."""
        backend.decode(
            "layer",
            self.query,
            self.pages[layer_idx],
            backend.DecodeMetadata(*self.rows(min_sparse_lens)),
            self.case.scale,
            self.case.config,
            self.scratch,
            output,
        )

    def _views(self, layer_buffer: torch.Tensor) -> backend.SemanticPages:
        layout = self.case.layout
        row = 2 * layout.head_size
        pool = layer_buffer.view(layout.dtype)
        kv_cache = pool.as_strided(
            (len(layer_buffer), layout.num_kv_heads, BLOCK_SIZE, row),
            (pool.stride(0), BLOCK_SIZE * row, row, 1),
        )
        return backend.SemanticPages(kv_cache, layout.index_view(kv_cache))

    def _fill(self, generator: torch.Generator) -> None:
        """Clustered random keys of about unit variance, in the first layer.

        A key is one of 64 directions of its KV head plus noise of half its length, and
        stays with a direction for 8 tokens, as text stays with a topic. Every row
        holds tokens of its own.
        """
        shape, device = self.case.shape, self.buffer.device
        heads, size = shape.num_kv_heads, shape.head_size
        directions = torch.randn(
            heads, _NUM_TOPICS, size, generator=generator, device=device
        )
        every_head = torch.arange(heads, device=device)[:, None]
        kv_cache = self.pages[0].kv_cache
        for pages in kv_cache.split(_PAGES_AT_ONCE):
            rows = torch.randn(pages.shape, generator=generator, device=device)
            topics = torch.randint(
                _NUM_TOPICS,
                (len(pages), heads, BLOCK_SIZE // _TOKENS_A_TOPIC),
                generator=generator,
                device=device,
            ).repeat_interleave(_TOKENS_A_TOPIC, dim=2)
            rows[..., :size] *= 0.5
            rows[..., :size] += directions[every_head, topics]
            pages.copy_(rows)

    def _index(self) -> None:
        blocks, sinks = self.indexed_blocks()
        for some_blocks, some_sinks in zip(
            blocks.split(_PAGES_AT_ONCE), sinks.split(_PAGES_AT_ONCE), strict=True
        ):
            if len(some_blocks):
                ops.index_pages(
                    *self.index(0),
                    some_blocks,
                    some_sinks,
                    self.case.config.num_iters,
                )


def num_score_parts(
    batch_size: int, shape: Shape, device: str, max_model_len: int
) -> int:
    """What the backend takes for a batch."""
    if device == "cpu":
        return CPU_NUM_SCORE_PARTS
    from vllm_clusterkv import cuda_backend

    return cuda_backend.num_score_parts(
        batch_size,
        shape.num_kv_heads,
        torch.cuda.get_device_properties(device).multi_processor_count,
        -(-max_model_len // BLOCK_SIZE),
    )


def num_splits(batch_size: int, shape: Shape, device: str) -> int:
    """What the backend takes for a batch."""
    if device == "cpu":
        return CPU_NUM_SPLITS
    from vllm_clusterkv import cuda_backend

    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return cuda_backend.num_splits(batch_size, shape.num_kv_heads, num_sms)


def make_scratch(case: Case, max_blocks: int, device: str) -> backend.DecodeScratch:
    """The scratch that the backend would hold for such batches."""
    shape = case.shape
    return backend.DecodeScratch(
        case.batch_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_size,
        max_blocks * case.config.num_clusters,
        lambda num_reqs: case.num_score_parts,
        lambda num_reqs: case.num_splits,
        torch.device(device),
        MAX_SCRATCH_BYTES,
    )


class OpCalls:
    """The ops one by one, on outputs that are allocated once."""

    def __init__(self, layers: Layers):
        case, query = layers.case, layers.query
        self.layers = layers
        batch, heads, size = query.shape
        kv_heads = case.shape.num_kv_heads
        max_clusters = layers.block_table.shape[1] * case.config.num_clusters
        new = query.new_zeros
        self.scores = new((batch, heads, max_clusters), dtype=torch.float32)
        self.softmax_sums = new(
            (batch, heads, case.num_score_parts, 2), dtype=torch.float32
        )
        self.selected = new((batch, kv_heads, max_clusters), dtype=torch.uint8)
        self.num_attended = new((batch, kv_heads), dtype=torch.int32)
        self.workspace = new(
            (batch, heads, case.num_splits, size + 2), dtype=torch.float32
        )
        self.output = torch.empty_like(query)
        self.score_clusters(0)
        self.select_clusters(0)

    def load(self) -> Load:
        """What the calls work on, as the first layer's selection has it."""
        case = self.layers.case
        num_clusters = case.num_indexed * case.config.num_clusters
        return Load(
            case.batch_size,
            case.context_len,
            self.num_attended.float().mean().item(),
            self.selected[..., :num_clusters].sum(-1).float().mean().item(),
            num_score_parts=case.num_score_parts,
        )

    def score_clusters(self, layer_idx: int) -> None:
        layers = self.layers
        ops.score_clusters(
            layers.query,
            *layers.index(layer_idx),
            *layers.rows(layers.all_sparse),
            layers.case.scale,
            layers.case.config.num_sink_tokens,
            self.scores,
            self.softmax_sums,
        )

    def select_clusters(self, layer_idx: int) -> None:
        layers, config = self.layers, self.layers.case.config
        ops.select_clusters(
            self.scores,
            self.softmax_sums,
            *layers.index(layer_idx),
            *layers.rows(layers.all_sparse),
            config.num_sink_tokens,
            config.token_budget,
            self.selected,
            self.num_attended,
        )

    def sparse_decode(self, layer_idx: int) -> None:
        layers, config = self.layers, self.layers.case.config
        ops.sparse_decode(
            layers.query,
            *layers.index(layer_idx),
            *layers.rows(layers.all_sparse),
            self.scores,
            self.selected,
            layers.case.scale,
            config.num_sink_tokens,
            config.tail_estimate,
            self.workspace,
            self.output,
        )


class LayerProducts:
    """The matrix products and norms of a Llama-3.1-8B layer, around its attention.

    A kernel between them finds none of its instructions in the multiprocessors, as in a
    model; one that runs again and again finds them all.
    """

    def __init__(self, batch_size: int, device: str):
        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02

        self.hidden = new(batch_size, 4096)
        self.norm = new(4096)
        self.qkv, self.out = new(4096, 6144), new(4096, 4096)
        self.gate_up, self.down = new(4096, 2 * 14336), new(14336, 4096)

    def __call__(self, attend: Callable[[], None] | None) -> None:
        """Runs a layer, with its attention or without."""
        self._norm(self.hidden) @ self.qkv
        if attend is not None:
            attend()
        hidden = self._norm(self.hidden @ self.out + self.hidden)
        gate, up = (hidden @ self.gate_up).chunk(2, dim=-1)
        torch.nn.functional.silu(gate).mul_(up) @ self.down

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden, (4096,), self.norm)


class IndexCall:
    """``index_pages`` of pages in all layers at once, as the CUDA backend calls it."""

    def __init__(self, layers: Layers, pages_a_layer: int):
        self.layers = layers
        blocks, sinks = layers.indexed_blocks()
        blocks_a_layer = layers.buffer.shape[1]
        bases = torch.arange(len(layers), device=blocks.device)[:, None]
        # Of each turn, pages_a_layer other pages: [num_layers * pages_a_layer]
        self.lists = [
            (
                (bases * blocks_a_layer + some_blocks).flatten().to(torch.int32),
                some_sinks.repeat(len(layers)),
            )
            for some_blocks, some_sinks in zip(
                blocks.split(pages_a_layer), sinks.split(pages_a_layer), strict=True
            )
        ]

    def __call__(self, turn: int) -> None:
        pages = self.layers.all_pages
        ops.index_pages(
            pages.kv_cache,
            pages.index,
            *self.lists[turn % len(self.lists)],
            self.layers.case.config.num_iters,
        )
