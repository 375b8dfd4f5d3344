# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What the backend is on every platform: capabilities, page spec and decode.

In each layer, K and V of the step's tokens are written to their pages (vLLM's slot
mapping). Rows that still have prompt to compute attend densely, by the platform's own
backend. Decode rows score the clusters of their indexed pages, select within the token
budget and attend (``decode``); the tail page is attended to exactly. Pages that the
step completes are clustered, sorted and indexed in place (``index_completed_pages``):
``docs/indexing.md`` has the order of these phases.

KV cache: vLLM's pool in the LBHNC layout, one block of 256 tokens a page, the
index behind each page (``page_layout.py`` has the bytes). There is no other
state: no request ids, no tables, nothing to clean up.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from vllm_clusterkv import observe, ops, requirements
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout

# A child of the logger that vLLM configures, so that its lines are seen.
logger = init_logger("vllm.clusterkv")


class ClusterKVBackend(AttentionBackend):
    """Capabilities and KV cache spec; a platform adds builder and impl."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]
    # The settings of the model being loaded. vLLM asks for the spec outside of any
    # config context, so the impl, which is built before, leaves them here.
    config: ClassVar[ClusterKVConfig] = ClusterKVConfig()

    @staticmethod
    def get_name() -> str:
        return "CLUSTERKV"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return requirements.HEAD_SIZES

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pads the page by its index.

        Raises:
            ValueError: The layer's KV cache is not plain full attention in pages.
        """
        if type(spec) is not FullAttentionSpec or spec.head_size_v != spec.head_size:
            raise ValueError(
                "clusterkv attention backend: KV cache specs must be "
                f"FullAttentionSpec with equal K and V head sizes, got {spec}"
            )
        if spec.block_size != BLOCK_SIZE:
            raise ValueError(
                "clusterkv attention backend: the KV cache block must be "
                f"{BLOCK_SIZE} tokens, got {spec.block_size}"
            )
        layout = PageLayout(
            spec.num_kv_heads, spec.head_size, cls.config.num_clusters, spec.dtype
        )
        return replace(spec, page_size_padded=layout.page_bytes)


@dataclass
class DecodeMetadata:
    """The decode rows of a step."""

    block_table: torch.Tensor  # [num_decodes, max_blocks] int32
    seq_lens: torch.Tensor  # [num_decodes] int32
    min_sparse_lens: torch.Tensor  # [num_decodes] int32, shorter rows attend densely
    # With a host tier: as ops.py has it, and the metadata that it was made from.
    index_table: torch.Tensor | None = None
    row_slots: torch.Tensor | None = None  # [num_decodes] int32
    source: "DecodeMetadata | None" = None


@dataclass
class HostPages:
    """One layer's pages on the host, and what of them is in hot blocks (``ops.py``)."""

    host_cache: torch.Tensor
    hot_blocks: torch.Tensor  # [num_slots, num_hot_blocks] int32; none: nothing is hot
    line_table: torch.Tensor
    hot_lines: torch.Tensor
    hot_order: torch.Tensor
    counters: torch.Tensor


@dataclass
class CompletedPages:
    """The pages that a step fills."""

    block_ids: torch.Tensor  # [num_pages] int32
    num_sink_tokens: torch.Tensor  # [num_pages] int32


@dataclass
class SemanticPages:
    """One layer's KV cache and the indexes behind its pages."""

    kv_cache: torch.Tensor  # [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size]
    index: torch.Tensor  # [num_blocks, num_kv_heads, index_bytes] uint8


class DecodeScratch:
    """What one ``decode`` writes between its ops. Calls that share it must not overlap.

    Attributes:
        max_rows: Rows that fit.
    """

    def __init__(
        self,
        max_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        max_clusters: int,
        num_score_parts: Callable[[int], int],
        num_splits: Callable[[int], int],
        device: torch.device,
        max_bytes: int | None = None,
    ) -> None:
        """Allocates it.

        Args:
            max_rows: Rows to hold at most.
            num_heads: Query heads of this rank.
            num_kv_heads: KV heads of this rank.
            head_size: Elements of a key, and of a value.
            max_clusters: Clusters of a row, at most.
            num_score_parts: Parts that ``score_clusters`` deals a row's pages to, by
                the rows of the call.
            num_splits: Parts that ``sparse_decode`` splits a row into, by the rows of
                the call.
            device: Where.
            max_bytes: Holds fewer rows, but at least one, to stay below. None for no
                limit.
        """
        row_bytes = max_clusters * (4 * num_heads + num_kv_heads) + 4 * num_kv_heads
        part_size = 2 * num_heads
        split_size = num_heads * (head_size + 2)
        most_parts = most_splits = self.max_rows = 0  # of all rows of a call
        for num_rows in range(1, max_rows + 1):
            parts = max(most_parts, num_rows * num_score_parts(num_rows))
            splits = max(most_splits, num_rows * num_splits(num_rows))
            num_bytes = num_rows * row_bytes
            num_bytes += 4 * (parts * part_size + splits * split_size)
            if max_bytes is not None and num_rows > 1 and num_bytes > max_bytes:
                break
            most_parts, most_splits, self.max_rows = parts, splits, num_rows
        self._row_shape = (num_heads, num_kv_heads, head_size)
        self._num_score_parts, self._num_splits = num_score_parts, num_splits

        def new(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        # Flat: rows are contiguous at each number of clusters, parts and splits.
        num_rows = self.max_rows
        self._scores = new(num_rows * num_heads * max_clusters, torch.float32)
        self._softmax_sums = new(most_parts * part_size, torch.float32)
        self._selected = new(num_rows * num_kv_heads * max_clusters, torch.uint8)
        self._num_attended = new(num_rows * num_kv_heads, torch.int32)
        self._workspace = new(most_splits * split_size, torch.float32)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        buffers = (
            self._scores,
            self._softmax_sums,
            self._selected,
            self._num_attended,
            self._workspace,
        )
        return sum(buffer.nbytes for buffer in buffers)

    def shape(self, num_rows: int, max_clusters: int) -> tuple[torch.Tensor, ...]:
        """The tensors for a call.

        Returns:
            scores: [num_rows, num_heads, max_clusters] fp32.
            softmax_sums: [num_rows, num_heads, num_score_parts, 2] fp32.
            selected: [num_rows, num_kv_heads, max_clusters] uint8.
            num_attended: [num_rows, num_kv_heads] int32.
            workspace: [num_rows, num_heads, num_splits, head_size + 2] fp32.
        """
        num_heads, num_kv_heads, head_size = self._row_shape

        def take(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
            return buffer[: prod(shape)].view(shape)

        return (
            take(self._scores, num_rows, num_heads, max_clusters),
            take(
                self._softmax_sums,
                num_rows,
                num_heads,
                self._num_score_parts(num_rows),
                2,
            ),
            take(self._selected, num_rows, num_kv_heads, max_clusters),
            take(self._num_attended, num_rows, num_kv_heads),
            take(
                self._workspace,
                num_rows,
                num_heads,
                self._num_splits(num_rows),
                head_size + 2,
            ),
        )


def decode(
    layer_name: str,
    query: torch.Tensor,
    pages: SemanticPages,
    metadata: DecodeMetadata,
    scale: float,
    config: ClusterKVConfig,
    scratch: DecodeScratch,
    output: torch.Tensor,
    host_pages: HostPages | None = None,
) -> None:
    """Sparse attention of the decode rows of one layer.

    Args:
        layer_name: For observers.
        query: [num_decodes, num_heads, head_size].
        pages: The layer's pages.
        metadata: The rows.
        scale: Softmax scale.
        config: Settings.
        scratch: Of the layer's shape. Rows that do not fit at once run in parts.
        output: [num_decodes, num_heads, head_size]. Written.
        host_pages: The layer's, with an ``index_table`` in ``metadata``.
    """
    index_table, slots = metadata.index_table, metadata.row_slots
    for start in range(0, len(query), scratch.max_rows):
        rows = slice(start, start + scratch.max_rows)
        _decode_rows(
            layer_name,
            query[rows],
            pages,
            DecodeMetadata(
                metadata.block_table[rows],
                metadata.seq_lens[rows],
                metadata.min_sparse_lens[rows],
                None if index_table is None else index_table[rows],
                None if slots is None else slots[rows],
            ),
            scale,
            config,
            scratch,
            output[rows],
            host_pages,
        )


def _decode_rows(
    layer_name: str,
    query: torch.Tensor,
    pages: SemanticPages,
    metadata: DecodeMetadata,
    scale: float,
    config: ClusterKVConfig,
    scratch: DecodeScratch,
    output: torch.Tensor,
    host_pages: HostPages | None,
) -> None:
    max_clusters = metadata.block_table.shape[1] * config.num_clusters
    scores, softmax_sums, selected, num_attended, workspace = scratch.shape(
        len(query), max_clusters
    )
    index = (pages.kv_cache, pages.index)
    rows = (metadata.block_table, metadata.seq_lens, metadata.min_sparse_lens)
    ops.score_clusters(
        query,
        *index,
        *rows,
        scale,
        config.num_sink_tokens,
        scores,
        softmax_sums,
        metadata.index_table,
    )
    ops.select_clusters(
        scores,
        softmax_sums,
        *index,
        *rows,
        config.num_sink_tokens,
        config.token_budget,
        selected,
        num_attended,
        metadata.index_table,
    )
    host_cache = line_table = None
    if host_pages is not None:
        host_cache = host_pages.host_cache
        if host_pages.hot_blocks.numel():
            line_table = host_pages.line_table
            assert metadata.index_table is not None and metadata.row_slots is not None
            ops.recall(
                selected,
                scores,
                *index,
                *rows,
                config.num_sink_tokens,
                metadata.index_table,
                host_cache,
                metadata.row_slots,
                host_pages.hot_blocks,
                line_table,
                host_pages.hot_lines,
                host_pages.hot_order,
                host_pages.counters,
            )
    ops.sparse_decode(
        query,
        *index,
        *rows,
        scores,
        selected,
        scale,
        config.num_sink_tokens,
        config.tail_estimate,
        workspace,
        output,
        metadata.index_table,
        host_cache,
        line_table,
    )
    if observe.observers:
        observe.notify(
            observe.DecodeStep(
                layer_name,
                query,
                *index,
                *rows,
                scale,
                scores,
                selected,
                num_attended,
                config,
            )
        )


def index_completed_pages(
    pages: SemanticPages, completed: CompletedPages, config: ClusterKVConfig
) -> None:
    """Indexes the pages that this step filled, in one layer."""
    ops.index_pages(
        pages.kv_cache,
        pages.index,
        completed.block_ids,
        completed.num_sink_tokens,
        config.num_iters,
    )


class ClusterKVImpl(AttentionImpl):
    """One layer's attention: what platforms share."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        for feature, value in {
            "ALiBi": alibi_slopes,
            "sliding-window attention": sliding_window,
            "logits soft cap": logits_soft_cap or None,
            "KV sharing between layers": kv_sharing_target_layer_name,
        }.items():
            if value is not None:
                raise ValueError(
                    f"clusterkv attention backend: the model has layers with "
                    f"{feature} ({value}), which is not supported; use another "
                    "--attention-backend for this model."
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.config = ClusterKVConfig.from_additional_config(
            get_current_vllm_config().additional_config
        )
        ClusterKVBackend.config = self.config

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends.

        Args:
            layer: The attention layer.
            query: [num_tokens, num_heads, head_size].
            key: [num_tokens, num_kv_heads, head_size]; in the cache already.
            value: As ``key``.
            kv_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size].
            attn_metadata: The batch, of the platform's type; None in the profile run.
            output: [num_tokens, num_heads, head_size]. Written.
            output_scale: Not supported.
            output_block_scale: Not supported.

        Returns:
            ``output``.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "clusterkv attention backend: fused output quantization"
            )
        if attn_metadata is None:
            return output.fill_(0)
        self._attend(layer, query, key, value, kv_cache, attn_metadata, output)
        return output

    def _attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """The phases of a step that the platform runs in a layer; as ``forward``."""
        raise NotImplementedError


def log_settings(config: ClusterKVConfig, layout: PageLayout) -> None:
    """Says in the server's log that the backend is active, and how."""
    logger.info_once(
        "Using CLUSTERKV attention: pages of %d tokens, %d tokens a cluster, "
        "budget %d tokens%s, index overhead %.1f%% of the KV cache.",
        BLOCK_SIZE,
        config.tokens_per_cluster,
        config.token_budget,
        " with tail estimate" if config.tail_estimate else "",
        100 * layout.overhead,
    )
