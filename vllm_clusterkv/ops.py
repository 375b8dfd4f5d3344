# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The ``clusterkv::`` ops: one documented function each.

All are out-variants: they return nothing, allocate nothing and never wait for the
device, so they can be captured in a CUDA graph. ``reference.py`` defines their
results; ``csrc/README.md`` says how each kernel gets there.

Shapes used throughout:

    kv_cache:     [num_blocks, num_kv_heads, block_size, 2 * head_size] bf16|fp16|fp32
    index:        [num_blocks, num_kv_heads, index_bytes] uint8. What is known of the
                  clusters of a page (``page_layout.IndexFields``). The number of bytes
                  says how many clusters a page has.
    block_table:  [num_reqs, max_blocks] int32. Pages of a row in kv_cache. For
                  ``sparse_decode``, ``-1 - h`` is page ``h`` of a host_cache.
    index_table:  [num_reqs, max_blocks] int32, or None. Where the indexes of a row's
                  pages are, where some are not behind their pages: units of 512 bytes
                  from the index of block 0.
    host_cache:   [num_host_pages, num_kv_heads, block_size, 2 * head_size], as
                  kv_cache, in CPU memory, pinned for CUDA; or None. Pages that have no
                  block, of whose rows ``sparse_decode`` reads the selected. A sparse
                  row's first page and its tail page must have one, and all pages of a
                  dense row.
    line_table:   [num_host_pages, num_kv_heads, block_size / 8] int32, contiguous, or
                  None. Of each *line*, 8 rows, of a host page: where kv_cache has a
                  copy, as ``block * (block_size / 8) + line``; -1 for nowhere.
    seq_lens:     [num_reqs] int32. Tokens including the current one; 0 is a padding
                  row. A row's first ``(seq_len - 1) // block_size`` pages are
                  indexed; the next one is its tail page.
    min_sparse_lens: [num_reqs] int32. A row with ``seq_len < min_sparse_len`` is
                  *dense*: it attends to all its tokens, and its pages need no index.

``max_clusters`` is ``max_blocks * num_clusters``; cluster ``c`` of a row's ``i``-th
page has index ``i * num_clusters + c``. ``num_parts`` is any number from 1 up that the
caller chooses: a row's ``i``-th page belongs to *part* ``i % num_parts``. Entries
beyond a row's indexed pages, those of parts without such pages, and all of a dense
row's, are neither read nor written. The last dimension of every tensor is dense. All
tensors of a call are on one device.

On CUDA devices, an op may start while the kernel before it ends (programmatic
dependent launch), if that kernel lets it; those of torch do not. ``score_clusters``
waits for all before it. ``select_clusters`` reads early all but scores and
``softmax_sums``, ``sparse_decode`` all but ``selected``. So ``sparse_decode`` must not
come right behind ``score_clusters``, nor either of them behind a kernel that lets the
next one start early and writes what they read.

A wrong device, shape, dtype or stride raises RuntimeError naming the argument, what
was expected and what came.
"""

import importlib

import torch

try:
    importlib.import_module("vllm_clusterkv._C")
except ImportError as error:
    raise ImportError(
        "vllm_clusterkv._C, the compiled extension, cannot be loaded "
        f"({error}). Build it with `pip install .` in the environment that has vLLM, "
        "and run from another folder than the clone's, whose sources hide what is "
        "installed; or with `pip install --no-build-isolation -e .`, and run anywhere."
    ) from error


def _load_cuda_kernels() -> bool:
    if not torch.version.cuda:
        return False
    try:
        importlib.import_module("vllm_clusterkv._C_cuda")
    except ModuleNotFoundError:
        return False  # built where there was no nvcc
    return True


HAS_CUDA_KERNELS = _load_cuda_kernels()
"""Whether the ops run on CUDA devices, too."""


def index_pages(
    kv_cache: torch.Tensor,
    index: torch.Tensor,
    block_ids: torch.Tensor,
    num_sink_tokens: torch.Tensor,
    num_iters: int,
) -> None:
    """Clusters, sorts and summarises complete pages, in place.

    Per page and KV head: spherical k-means of the keys. Keys far from each other
    start the clusters: the page's first, then again and again the key whose largest
    cosine to those chosen is least (ties to the lowest row; a key that is zero or
    not finite is not chosen). ``num_iters`` rounds assign each key to the centroid
    of the largest cosine (ties to the lowest cluster) and move each centroid to the
    mean of its unnormalised keys (an empty cluster stays). The rows are then sorted
    by cluster, keeping their order within it; means of K and V, in 4 bits an element
    (``short_means.py``), the spread of K and the cluster ends are stored. An empty
    cluster has no radius, and steps of zero.

    Attention over a set of past tokens does not depend on their order, so sorting
    a page changes no result. Deterministic.

    Args:
        kv_cache: Rows of the listed pages are permuted, K with its V.
        index: Written, of the listed pages. What it has is computed in fp32.
        block_ids: [num_pages] int32. Pages to index, each once; -1 entries are skipped.
        num_sink_tokens: [num_pages] int32. Rows at the page's start that stay where
            they are and join no cluster: the attention sinks of a request's first
            page, 0 in any other.
        num_iters: Rounds, at least 1.

    Source: ClusterKV (arXiv 2412.03213), its distance and centroids; the first keys
    by Gonzalez's farthest-first traversal; clustering within a page is this work.
    """
    torch.ops.clusterkv.index_pages.default(
        kv_cache,
        index,
        block_ids,
        num_sink_tokens,
        num_iters,
    )


def score_clusters(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    index: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    min_sparse_lens: torch.Tensor,
    scale: float,
    num_sink_tokens: int,
    scores: torch.Tensor,
    softmax_sums: torch.Tensor,
    index_table: torch.Tensor | None = None,
) -> None:
    """Scores every cluster of every sparse row's indexed pages.

    ``scores[r, h, c]`` estimates the logarithm of the mean weight of a cluster's keys:
    ``scale * query[r, h] . mean_key[c]``, with the means of query head ``h``'s KV head,
    and, for their *spread*, ``min(0.75 * (sqrt(1 + variance) - 1), 4)``. ``variance``
    is that of the logits of the cluster's keys, as its page's profile has it: ``(scale
    * radius[c])**2 * sum(query[r, h]**2 * profile)``. Squares, and the products of the
    query with ``key_deviations``, are rounded to the query's dtype (in fp16, squares of
    a 16th of the query, cut at 255; products cut at 65504).

    For the softmax of the next op, ``softmax_sums[r, h, part]`` is, of the part's
    clusters that have tokens, the max of ``scores`` and the sum of ``count[c] *
    exp(scores[r, h, c] - max)``: ``(-inf, 0)`` if none has. Where such a score is NaN
    or infinite, both may be NaN.

    Args:
        query: [num_reqs, num_heads, head_size], as kv_cache.
        scale: Softmax scale, 1 / sqrt(head_size) as a rule.
        num_sink_tokens: Unclustered rows at the start of a request's first page.
        scores: [num_reqs, num_heads, max_clusters] fp32, contiguous. Written.
        softmax_sums: [num_reqs, num_heads, num_parts, 2] fp32, contiguous. Written: max
            and sum of each part.

    Source: ClusterKV (arXiv 2412.03213), selection by inner product; the spread, and
    means of 4 bits, are this work.
    """
    torch.ops.clusterkv.score_clusters.default(
        query,
        kv_cache,
        index,
        block_table,
        seq_lens,
        min_sparse_lens,
        scale,
        num_sink_tokens,
        scores,
        softmax_sums,
        index_table,
    )


def select_clusters(
    scores: torch.Tensor,
    softmax_sums: torch.Tensor,
    kv_cache: torch.Tensor,
    index: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    min_sparse_lens: torch.Tensor,
    num_sink_tokens: int,
    token_budget: int,
    selected: torch.Tensor,
    num_attended: torch.Tensor,
    index_table: torch.Tensor | None = None,
) -> None:
    """Chooses the clusters that each row and KV head attends to exactly.

    Clusters are ranked by weight a token, summed over the query heads of the KV
    head: ``sum_h exp(scores[h, c]) / sum_c' count[c'] * exp(scores[h, c'])``; ties
    go to the lowest index. The fewest clusters whose tokens reach ``token_budget``
    are taken, so a row may exceed the budget by less than its last cluster. The
    sinks and the tail page are attended to in any case and do not count. If a
    row's clustered tokens fit the budget, all are selected and attention is exact.
    Of a dense row nothing is selected, and all tokens are attended to.

    Args:
        scores: [num_reqs, num_heads, max_clusters] fp32, contiguous; from
            ``score_clusters``.
        softmax_sums: [num_reqs, num_heads, num_parts, 2] fp32, contiguous; from
            ``score_clusters``, of these scores and with the same ``num_sink_tokens``.
        num_sink_tokens: Unclustered rows at the start of a request's first page.
        token_budget: Tokens, at least 1.
        selected: [num_reqs, num_kv_heads, max_clusters] uint8, contiguous. Written:
            1 if selected, else 0.
        num_attended: [num_reqs, num_kv_heads] int32, contiguous. Written: tokens
            attended to exactly, with sinks and tail page.

    Source: ClusterKV (arXiv 2412.03213), ranking and budget; the vote of the query
    heads is this work.
    """
    torch.ops.clusterkv.select_clusters.default(
        scores,
        softmax_sums,
        kv_cache,
        index,
        block_table,
        seq_lens,
        min_sparse_lens,
        num_sink_tokens,
        token_budget,
        selected,
        num_attended,
        index_table,
    )


def sparse_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    index: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    min_sparse_lens: torch.Tensor,
    scores: torch.Tensor,
    selected: torch.Tensor,
    scale: float,
    num_sink_tokens: int,
    tail_estimate: bool,
    workspace: torch.Tensor,
    output: torch.Tensor,
    index_table: torch.Tensor | None = None,
    host_cache: torch.Tensor | None = None,
    line_table: torch.Tensor | None = None,
) -> None:
    """Attends each row to its sinks, selected clusters and tail page.

    With ``tail_estimate``, every cluster left out is one more row: its mean value,
    with the logit ``scores[c] + log(count[c])``. All rows share one softmax. A dense
    row attends to its first ``seq_len`` rows and nothing else. The output of a padding
    row is zero. Deterministic, and independent of the batch for a given number of
    splits.

    Args:
        query: [num_reqs, num_heads, head_size], as kv_cache.
        scores: As ``score_clusters``; read with ``tail_estimate``, of all clusters
            with tokens. Must be ``score_clusters``'s: on CUDA, the means of all
            clusters come in and those of the selected ones are taken out again, which
            is exact as long as a selected cluster's mean does not outweigh its rows by
            more than e^8 (it does by e^4 at most, and by the rounding of its key).
        selected: As ``select_clusters``.
        scale: Softmax scale.
        num_sink_tokens: Unclustered rows at the start of a request's first page.
        tail_estimate: Whether clusters left out are stood in for by their means.
        workspace: [num_reqs, num_heads, num_splits, head_size + 2] fp32, contiguous.
            Scratch; its third dimension is the number of splits.
        output: [num_reqs, num_heads, head_size], as kv_cache. Written.

    Source: ClusterKV (arXiv 2412.03213) for the exact part; Chelsea (arXiv
    2506.11418), means weighted by their count, for the estimate; the join is this
    work.
    """
    torch.ops.clusterkv.sparse_decode.default(
        query,
        kv_cache,
        index,
        block_table,
        seq_lens,
        min_sparse_lens,
        scores,
        selected,
        scale,
        num_sink_tokens,
        tail_estimate,
        workspace,
        output,
        index_table,
        host_cache,
        line_table,
    )


def recall(
    selected: torch.Tensor,
    scores: torch.Tensor,
    kv_cache: torch.Tensor,
    index: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    min_sparse_lens: torch.Tensor,
    num_sink_tokens: int,
    index_table: torch.Tensor,
    host_cache: torch.Tensor,
    row_slots: torch.Tensor,
    hot_blocks: torch.Tensor,
    line_table: torch.Tensor,
    hot_lines: torch.Tensor,
    hot_order: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Brings the host pages' rows that a step selected into hot blocks.

    A row's request has a slot, and a slot has blocks of kv_cache that hold lines of
    its host pages, for each KV head others. Lines with rows of selected clusters that
    are not there replace those that have not been used for longest, in the order of
    the row. Where more are needed than fit beside those found, the last ones stay on
    the host, and ``sparse_decode`` reads them there. Deterministic.

    Args:
        selected: As ``select_clusters``.
        scores: As ``select_clusters``; only counted by.
        kv_cache: The hot blocks' rows are written.
        num_sink_tokens: Unclustered rows at the start of a request's first page.
        row_slots: [num_reqs] int32, contiguous; -1 for a row without a slot.
        hot_blocks: [num_slots, num_hot_blocks] int32, contiguous.
        line_table: Kept up to date, of the rows' host pages.
        hot_lines: [num_slots, num_kv_heads, P] int32, contiguous. Kept: the line that
            a position holds, as ``page * (block_size / 8) + line`` with the page's
            number in the row; -1 for none. Position ``p`` is line
            ``p % (block_size / 8)`` of hot block ``p // (block_size / 8)``. -1
            everywhere for a slot that is new. A slot's row does not get shorter.
        hot_order: [num_slots, num_kv_heads, P] int32, contiguous. Kept: positions,
            those used last at the end. Any order for a slot that is new.
        counters: [len(COUNTERS)] int64, contiguous. Added to: lines found, recalled,
            and left on the host; rows and KV heads that have a slot, and the sum of
            the nanoseconds that each took; of those whose row has a multiple of
            ``MASS_EVERY`` tokens and one, the clusters' weight that is selected,
            in units of ``MASS_UNIT``, and their number.

    Source: ClusterKV (arXiv 2412.03213), the cache of recalled clusters; lines instead
    of clusters, and least recently used instead of the last steps', are this work.
    """
    torch.ops.clusterkv.recall.default(
        selected,
        scores,
        kv_cache,
        index,
        block_table,
        seq_lens,
        min_sparse_lens,
        num_sink_tokens,
        index_table,
        host_cache,
        row_slots,
        hot_blocks,
        line_table,
        hot_lines,
        hot_order,
        counters,
    )


def _returns_nothing(*args) -> None:
    """Fake kernel of an out-variant: there is nothing to infer."""


for _op in (
    "index_pages",
    "score_clusters",
    "select_clusters",
    "recall",
    "sparse_decode",
):
    torch.library.register_fake(f"clusterkv::{_op}", _returns_nothing)
