# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What the backend is on every platform: capabilities, page spec and decode.

Phases of a step, in each layer:

1. K and V of the step's tokens are written to their pages (vLLM's slot mapping).
2. Rows that still have prompt to compute: dense causal attention, by the platform's
   own backend. Sorted pages before the chunk need no special case.
3. Pages that the step completes are clustered, sorted and indexed in place
   (``index_completed_pages``). Behind 2, whose causal mask needs the order of the
   chunk; before 4, because vLLM shares a page in the very step that completes it: a
   request resumed after preemption may find all its tokens but the last in pages
   that another row of the batch fills, and then decodes over their index.
4. Decode rows: score the clusters of their indexed pages, select within the token
   budget, attend (``decode``). The tail page is attended to exactly.

KV cache: vLLM's pool in the LBHNC layout, one block of 256 tokens a page, the
index behind each page (``page_layout.py`` has the bytes). There is no other
state: no request ids, no tables, nothing to clean up.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from vllm_clusterkv import observe, ops, requirements
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout

NUM_SPLITS = 8
"""Parts of a row's pages that ``sparse_decode`` attends to separately. A constant,
so that a row's result does not depend on its batch."""


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


@dataclass
class CompletedPages:
    """The pages that a step fills."""

    block_ids: torch.Tensor  # [num_pages] int32
    num_sink_tokens: torch.Tensor  # [num_pages] int32


@dataclass
class SemanticPages:
    """One layer's KV cache and the index views behind its pages."""

    kv_cache: torch.Tensor  # [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size]
    centroids: torch.Tensor  # [num_blocks, num_kv_heads, 2, num_clusters, head_size]
    cluster_ends: torch.Tensor  # [num_blocks, num_kv_heads, num_clusters] int16


def decode(
    layer_name: str,
    query: torch.Tensor,
    pages: SemanticPages,
    metadata: DecodeMetadata,
    scale: float,
    config: ClusterKVConfig,
    output: torch.Tensor,
) -> None:
    """Sparse attention of the decode rows of one layer.

    Args:
        layer_name: For observers.
        query: [num_decodes, num_heads, head_size].
        pages: The layer's pages.
        metadata: The rows.
        scale: Softmax scale.
        config: Settings.
        output: [num_decodes, num_heads, head_size]. Written.
    """
    num_reqs, num_heads, head_size = query.shape
    num_kv_heads = pages.kv_cache.shape[1]
    max_clusters = metadata.block_table.shape[1] * config.num_clusters
    new = query.new_empty
    scores = new((num_reqs, num_heads, max_clusters), dtype=torch.float32)
    selected = new((num_reqs, num_kv_heads, max_clusters), dtype=torch.uint8)
    num_attended = new((num_reqs, num_kv_heads), dtype=torch.int32)
    workspace = new(
        (num_reqs, num_heads, NUM_SPLITS, head_size + 2), dtype=torch.float32
    )
    index = (pages.kv_cache, pages.centroids, pages.cluster_ends)
    rows = (metadata.block_table, metadata.seq_lens, metadata.min_sparse_lens)
    ops.score_clusters(query, *index, *rows, scale, scores)
    ops.select_clusters(
        scores,
        *index,
        *rows,
        config.num_sink_tokens,
        config.token_budget,
        selected,
        num_attended,
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
        pages.centroids,
        pages.cluster_ends,
        completed.block_ids,
        completed.num_sink_tokens,
        config.num_iters,
    )
