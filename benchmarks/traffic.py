# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The bytes that each op has to move: every input read once, every output written once.

The floor of an op's time is these bytes over the bandwidth of a copy on the same GPU.
What an implementation moves besides (scratch, a page read twice) does not count.
"""

from dataclasses import dataclass

import torch

from vllm_clusterkv import short_means
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout


@dataclass(frozen=True)
class Shape:
    """The attention of a model."""

    name: str = "Llama-3.1-8B"
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    num_clusters: int = ClusterKVConfig().num_clusters
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Load:
    """What one call works on.

    Attributes:
        batch_size: Decode rows.
        seq_len: Tokens of each row, with the current one.
        attended: Tokens attended to exactly, a row and KV head (mean).
        selected: Clusters attended to exactly, a row and KV head (mean).
        num_pages: Pages that ``index_pages`` indexes.
        num_score_parts: Parts that ``score_clusters`` deals a row's pages to.
    """

    batch_size: int
    seq_len: int
    attended: float = 0
    selected: float = 0
    num_pages: int = 0
    num_score_parts: int = 0


def mean_value_bytes(layout: PageLayout) -> int:
    """Bytes of a cluster's mean value: codes and a step."""
    return short_means.code_bytes(1, layout.head_size) + layout.dtype.itemsize


def scored_bytes(layout: PageLayout) -> int:
    """Bytes of a page and KV head's index that scoring reads: all but mean values."""
    return layout.index_bytes - layout.num_clusters * mean_value_bytes(layout)


def bytes_owed(op: str, shape: Shape, load: Load) -> int:
    """Bytes that one call of ``op`` has to move.

    ``C`` clusters a row and KV head; half = head_size elements of the KV dtype:

        score_clusters   query, of the pages' indexes all but what is of values; scores
                         (fp32, a query head), softmax_sums (two fp32 for a part that
                         has pages, a query head)
        select_clusters  scores, softmax_sums, C ends; C marks (one byte a KV head),
                         num_attended
        sparse_decode    query, C marks, C ends, attended keys and values, mean values
                         (codes and a step) and scores of the clusters left out; output
        decode           the three as one: query, what of the indexes is not of values,
                         attended keys and values, mean values of the clusters left
                         out; output. Scores, sums and marks pass between the ops and
                         are nobody's result
        decode_dense, flash_attn, flashinfer, xformers
                         query, all keys and values; output
        index_pages      the pages' keys and values, read and written; indexes

    The block table, 4 bytes a page, is left out.

    Args:
        op: One of the above.
        shape: The model.
        load: The call.
    """
    half = shape.head_size * shape.dtype.itemsize
    layout = PageLayout(
        shape.num_kv_heads, shape.head_size, shape.num_clusters, shape.dtype
    )
    mean_value = mean_value_bytes(layout)
    page_bytes = shape.num_kv_heads * BLOCK_SIZE * 2 * half
    if op == "index_pages":
        index_bytes = shape.num_kv_heads * layout.index_bytes
        return load.num_pages * (2 * page_bytes + index_bytes)
    num_pages = (load.seq_len - 1) // BLOCK_SIZE
    clusters = num_pages * shape.num_clusters
    left_out = clusters - load.selected
    query = shape.num_heads * half  # of a row; the output takes as much
    scores = shape.num_heads * clusters * torch.float32.itemsize
    parts = min(load.num_score_parts, num_pages)
    sums = shape.num_heads * parts * 2 * torch.float32.itemsize
    kv_heads = shape.num_kv_heads
    ends = kv_heads * clusters * torch.int16.itemsize
    marks = kv_heads * clusters
    scored = kv_heads * num_pages * scored_bytes(layout)
    exact = kv_heads * load.attended * 2 * half
    estimate = kv_heads * left_out * mean_value
    dense = 2 * query + kv_heads * load.seq_len * 2 * half
    scores_left_out = scores * left_out / clusters if clusters else 0
    a_row = {
        "score_clusters": query + scored + scores + sums,
        "select_clusters": scores
        + sums
        + ends
        + marks
        + kv_heads * torch.int32.itemsize,  # num_attended
        "sparse_decode": 2 * query + marks + ends + exact + estimate + scores_left_out,
        "decode": 2 * query + scored + exact + estimate,
        "decode_dense": dense,
        "flash_attn": dense,
        "flashinfer": dense,
        "xformers": dense,
    }
    return round(load.batch_size * a_row[op])
