# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Which pages a step completes, and indexing them in all layers at once, a step later.

``docs/indexing.md`` says why that is correct, and why the CPU backend does it within
the step instead.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_clusterkv.backend import (
    CompletedPages,
    SemanticPages,
    index_completed_pages,
)
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout


def completed_pages(
    num_computed: np.ndarray, seq_lens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pages that rows fill.

    Args:
        num_computed: [num_reqs] tokens of each row before the step.
        seq_lens: [num_reqs] tokens of each row behind it.

    Returns:
        rows: [num_pages] int64, the row of each page that it fills.
        pages: [num_pages] int64, the page's position in the row, from 0.
    """
    first, end = num_computed // BLOCK_SIZE, seq_lens // BLOCK_SIZE
    num_pages = np.maximum(end - first, 0)
    rows = np.repeat(np.arange(len(seq_lens)), num_pages)
    # Pages of earlier rows come before; counting begins at each row's first.
    num_before = np.cumsum(num_pages) - num_pages
    pages = np.arange(len(rows)) + np.repeat(first - num_before, num_pages)
    return rows, pages


@dataclass
class LayerSpan:
    """Layers whose pages are evenly spaced in memory, seen as one."""

    pages: SemanticPages
    bases: torch.Tensor  # [num_layers, 1] int32: block b of layer l is bases[l] + b


def span_layers(kv_caches: list[torch.Tensor], layout: PageLayout) -> list[LayerSpan]:
    """Joins the pages of layers, so that one kernel launch can index all of them.

    vLLM puts the layers of a model into one buffer. If they begin a multiple of the
    page apart, as in the LBHNC layout, one view covers them.

    Args:
        kv_caches: Each layer's view, [num_blocks, num_kv_heads, BLOCK_SIZE,
            2 * head_size].
        layout: Of the pages.

    Returns:
        One span for all layers, or one for each.
    """
    first = min(kv_caches, key=lambda cache: cache.storage_offset())
    block_stride = first.stride(0)
    offsets = [cache.storage_offset() - first.storage_offset() for cache in kv_caches]
    if any(
        cache.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        or cache.shape != first.shape
        or cache.stride() != first.stride()
        or offset % block_stride
        for cache, offset in zip(kv_caches, offsets, strict=True)
    ):
        spans = [(cache, [0]) for cache in kv_caches]
    else:
        bases = [offset // block_stride for offset in offsets]
        num_pages = max(bases) + first.shape[0]
        spans = [
            (first.as_strided((num_pages, *first.shape[1:]), first.stride()), bases)
        ]
    return [
        LayerSpan(
            SemanticPages(pages, layout.index_view(pages)),
            torch.tensor(bases, dtype=torch.int32, device=pages.device)[:, None],
        )
        for pages, bases in spans
    ]


class DeferredIndexing:
    """Holds the pages that a step completes, until the next step begins."""

    def __init__(self) -> None:
        self._pending: CompletedPages | None = None

    def defer(self, completed: CompletedPages | None) -> None:
        """Takes the pages of the current step; those of the last one must have run."""
        assert self._pending is None
        self._pending = completed

    def run(self, spans: list[LayerSpan], config: ClusterKVConfig) -> None:
        """Indexes what is pending, in every layer."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        for span in spans:
            num_layers = len(span.bases)
            completed = CompletedPages(
                block_ids=(span.bases + pending.block_ids).flatten(),
                num_sink_tokens=pending.num_sink_tokens.repeat(num_layers),
            )
            index_completed_pages(span.pages, completed, config)
