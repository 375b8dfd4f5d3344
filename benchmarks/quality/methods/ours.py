# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The product: semantic pages (``vllm_clusterkv``), with and without the tail estimate.

When a page of 256 tokens is full, each KV head's keys are clustered within it, 16
tokens a cluster. Clusters of all full pages are ranked by the query heads' softmax
weights a token and taken until the budget is reached.

With the product's settings clusters and codes come from ``ops.index_pages``, the
kernel that serving runs, with others from ``kmeans.cluster_keys`` and
``key_codes.encode``, the same in PyTorch. The order is ``reference.rank_weights``.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from benchmarks.quality.methods import short_means
from benchmarks.quality.methods.base import BYTES_PER_ELEMENT
from benchmarks.quality.methods.groups import (
    GroupedIndex,
    GroupedMethod,
    count_labels,
)
from benchmarks.quality.methods.kmeans import check_init, cluster_keys
from vllm_clusterkv import key_codes, ops, reference
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout
from vllm_clusterkv.requirements import CUDA_HEAD_SIZES, HEAD_SIZES

_END_BYTES = 2
"""Where a cluster ends in its page, an int16."""

CODED_CLUSTERS = (8, 16, 32)
"""Clusters of pages that codes of keys are defined for."""


@dataclass(frozen=True)
class Ours(GroupedMethod):
    """Settings; the defaults are the product's.

    Attributes:
        tokens_per_cluster: Average tokens a cluster. Divides ``page_size``.
        num_iters: Rounds of k-means.
        init: Keys that start the clusters; one of ``kmeans.INITS``.
        spread: Whether scores know how far keys are from the means of their clusters.
        coded: Whether clusters are ranked by codes of their keys, too. Needs
            ``spread``, and 8, 16 or 32 clusters a page.
        mean_bits: Bits of an element of a cluster's mean key and value, 3 to 8, or 16
            for as stored now. Fewer as ``round_means`` has it.
    """

    tail: bool = True
    tokens_per_cluster: int = 16
    num_iters: int = 4
    init: str = "farthest"
    spread: bool = True
    coded: bool = True
    mean_bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(self.init)
        if self.page_size % self.tokens_per_cluster:
            raise ValueError(
                f"tokens_per_cluster must divide the page of {self.page_size} tokens, "
                f"got {self.tokens_per_cluster}"
            )
        if self.mean_bits not in (3, 4, 5, 6, 7, 8, 16):
            raise ValueError(f"mean_bits must be 3 to 8, or 16, got {self.mean_bits}")
        if self.coded and not (self.spread and self.num_clusters in CODED_CLUSTERS):
            raise ValueError(
                "coded must be false without spread, and where page_size over "
                "tokens_per_cluster is not 8, 16 or 32; got true, the default, "
                f"with spread {self.spread} and {self.num_clusters} clusters"
            )

    @property
    def num_clusters(self) -> int:
        """Clusters a page and KV head."""
        return self.page_size // self.tokens_per_cluster

    def index(self, scale: float) -> "OursIndex":
        return OursIndex(self, scale)


class OursIndex(GroupedIndex):
    """Clusters of each full page before the last one.

    Attributes:
        spreads: [num_kv_heads, num_pages, head_size + num_clusters], as the keys.
        codes: ``key_codes.decode``'s, the first dimensions as those of spreads.
    """

    method: Ours

    def __init__(self, method: Ours, scale: float) -> None:
        super().__init__(method, scale)
        self.spreads: torch.Tensor | None = None
        self.codes: tuple[torch.Tensor, ...] | None = None

    def _form_groups(self, keys, values) -> None:
        method, start = self.method, self.labels.shape[1]
        end = method.last_page_start(self.seq_len)
        if end == start:
            return
        keys, values = keys[:, start:end], values[:, start:end]
        # [num_kv_heads, num_pages, page_size, head_size]
        pages = keys.unflatten(1, (-1, method.page_size))
        sinks = method.num_sink_tokens if start == 0 else 0
        codes = None
        if has_kernel(pages, method):
            labels, codes = index_by_op(pages, method, sinks)
        else:
            labels = label_in_torch(pages, method, sinks)
        if method.spread:
            spreads = page_spreads(pages, labels, method.num_clusters)
            if method.coded and codes is None:
                codes = encode_pages(pages, labels, spreads)
            old = [] if self.spreads is None else [self.spreads]
            self.spreads = torch.cat([*old, spreads], 1)
        if method.coded:
            layout = (method.num_clusters, pages.shape[3], pages.dtype)
            dims, deviations, signed = key_codes.decode(codes, *layout)
            decoded = (dims, deviations, signed.to(torch.int8))
            if self.codes is not None:
                both = zip(self.codes, decoded, strict=True)
                decoded = tuple(torch.cat(pair, 1) for pair in both)
            self.codes = decoded
        page = torch.arange(pages.shape[1], device=keys.device)[:, None]
        labels = torch.where(labels < 0, -1, labels + page * method.num_clusters)
        num_groups = pages.shape[1] * method.num_clusters
        self._append(keys, values, labels.flatten(1), num_groups)
        if method.mean_bits < 16:
            for means in (self.mean_keys, self.mean_values):
                new = means[:, -num_groups:].unflatten(1, (-1, method.num_clusters))
                of_keys = means is self.mean_keys
                new.copy_(round_means(new, method.mean_bits, of_keys))

    def _scores(self, query) -> torch.Tensor:
        of_mean = super()._scores(query)
        if self.spreads is None:
            return of_mean
        # [num_kv_heads, group, num_pages, num_clusters]
        squares = reference.query_squares(query)[:, :, None]
        spreads = self.spreads[:, None].float()
        added = reference.spread_score(squares, spreads, self.scale)
        scores = of_mean + added.flatten(2)
        if self.codes is None:
            return scores
        radii = self.scale * spreads[..., query.shape[2] :]
        decoded = tuple(part[:, None] for part in self.codes)
        best = key_codes.best_key(query[:, :, None], decoded, radii).flatten(2)
        counts = count_labels(self.labels, scores.shape[2])[:, None]
        return reference.best_score(scores, of_mean, best, counts)

    def _estimates(self, query, scores) -> torch.Tensor:
        if self.codes is None:
            return scores
        return scores.minimum(super()._scores(query) + reference.SPREAD_MOST)

    def _index_bytes(self, num_groups, num_selected) -> float | torch.Tensor:
        scanned = super()._index_bytes(num_groups, num_selected)
        if self.method.mean_bits < 16:
            scanned = num_groups * self._rounded_bytes(of_keys=True)
        if self.spreads is not None:
            num_elements = self.spreads.shape[1] * self.spreads.shape[2]
            scanned = scanned + BYTES_PER_ELEMENT * num_elements
        if self.codes is not None:
            num_clusters, head_size = self.method.num_clusters, self.mean_keys.shape[2]
            layout = PageLayout(1, head_size, num_clusters, torch.bfloat16)
            scanned = scanned + num_groups // num_clusters * layout.code_bytes
        return scanned + _END_BYTES * num_groups

    def _mean_value_bytes(self) -> float | None:
        if self.method.mean_bits == 16:
            return None
        return self._rounded_bytes(of_keys=False)

    def _rounded_bytes(self, of_keys: bool) -> float:
        """Of a mean with its step, and its share of what its page has in common."""
        head_size, method = self.mean_keys.shape[2], self.method
        num_common = 2 if of_keys or method.mean_bits != 4 else 1
        common = num_common * head_size * BYTES_PER_ELEMENT / method.num_clusters
        return head_size * method.mean_bits / 8 + BYTES_PER_ELEMENT + common


def round_means(means: torch.Tensor, bits: int, of_keys: bool) -> torch.Tensor:
    """Means with elements of a few bits, of 4 as ``short_means`` has them.

    What is rounded is a mean's difference from the mean of its page's means, over the
    deviation of that dimension: keys have some dimensions that are many times as large
    as others, and steps of one size would leave nothing of those.

    Args:
        means: [..., num_pages, num_clusters, head_size].
        bits: Of an element: levels at equal steps, the outermost at a cluster's largest
            element.
        of_keys: Whether they are of keys.
    """
    dtype, exact = means.dtype, means.float()
    if bits == 4:
        coded = short_means.encode(exact, torch.bfloat16, of_keys)
        return short_means.decode(*coded, of_keys).to(dtype)
    base = exact.mean(-2, keepdim=True).to(torch.bfloat16).float()
    off = exact - base
    deviations = off.square().mean(-2, keepdim=True).sqrt().to(torch.bfloat16).float()
    parts = torch.where(deviations > 0, off / deviations, 0)
    top = (2**bits - 1) / 2
    steps = (parts.abs().amax(-1, keepdim=True) / top).to(torch.bfloat16).float()
    levels = (parts / steps.clamp(min=1e-30) - 0.5).round() + 0.5
    return (base + levels.clamp(-top, top) * steps * deviations).to(dtype)


def page_spreads(pages, labels, num_clusters: int) -> torch.Tensor:
    """``reference.key_spread`` of many pages, rounded as stored.

    Args:
        pages: [num_kv_heads, num_pages, page_size, head_size], keys.
        labels: [num_kv_heads, num_pages, page_size] int64; -1 for no cluster.
        num_clusters: Of a page.

    Returns:
        [num_kv_heads, num_pages, head_size + num_clusters], as the keys.
    """
    keys = pages.float()
    members = one_hot(labels + 1, num_clusters + 1)[..., 1:].mT.float()
    counts = members.sum(3, keepdim=True)  # [..., num_clusters, 1]
    means = members @ keys / counts.clamp(min=1)
    is_member = members.sum(2)[..., None]  # [..., page_size, 1]
    squares = (keys - members.mT @ means) ** 2 * is_member
    variances = squares.sum(2)
    mean = variances.mean(2, keepdim=True)
    profile = torch.where(mean > 0, variances / mean, 0)
    radii = (members @ squares / counts.clamp(min=1)).mean(3).sqrt()
    return torch.cat([profile, radii], 2).to(pages.dtype)


def has_kernel(pages: torch.Tensor, method: Ours) -> bool:
    """Whether ``ops.index_pages`` takes these pages with these settings."""
    if pages.is_cuda:
        head_sizes = CUDA_HEAD_SIZES if ops.HAS_CUDA_KERNELS else []
        page_sizes = range(BLOCK_SIZE, BLOCK_SIZE + 1)
        dtypes = [torch.bfloat16, torch.float16]
    else:
        head_sizes = HEAD_SIZES
        page_sizes = range(1, BLOCK_SIZE + 1)
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
    return (
        method.init == "farthest"
        and method.page_size in page_sizes
        and method.num_clusters in (8, 16, 32)
        and pages.shape[3] in head_sizes
        and pages.dtype in dtypes
    )


def index_by_op(
    pages: torch.Tensor, method: Ours, num_sinks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cluster in its page of each row, and codes, by the product's kernel.

    Args:
        pages: [num_kv_heads, num_pages, page_size, head_size], keys.
        method: Settings.
        num_sinks: Rows at the start of the first page that are in no cluster.

    Returns:
        labels: [num_kv_heads, num_pages, page_size] int64; -1 for the sinks.
        codes: [num_kv_heads, num_pages, code_bytes] uint8.
    """
    num_kv_heads, num_pages, num_rows, head_size = pages.shape
    num_clusters, device = method.num_clusters, pages.device
    cache = pages.new_zeros((num_pages, num_kv_heads, num_rows, 2 * head_size))
    cache[..., :head_size] = pages.transpose(0, 1)
    # The op sorts rows with their values, which clustering does not look at: let the
    # first element of the value say where the row was. 16 bits can tell 256 rows.
    position = torch.arange(num_rows, device=device)
    cache[..., head_size] = position.to(pages.dtype)
    ends = torch.empty(
        (num_pages, num_kv_heads, num_clusters), dtype=torch.int16, device=device
    )
    layout = PageLayout(num_kv_heads, head_size, num_clusters, pages.dtype)
    codes = torch.empty(
        (num_pages, num_kv_heads, layout.code_bytes), dtype=torch.uint8, device=device
    )
    sinks = torch.zeros(num_pages, dtype=torch.int32, device=device)
    sinks[0] = num_sinks
    ops.index_pages(
        cache,
        pages.new_empty((num_pages, num_kv_heads, 2, num_clusters, head_size)),
        pages.new_empty((num_pages, num_kv_heads, head_size + num_clusters)),
        ends,
        codes,
        torch.arange(num_pages, dtype=torch.int32, device=device),
        sinks,
        method.num_iters,
    )
    origins = cache[..., head_size].long()  # [num_pages, num_kv_heads, page_size]
    rows = position.expand(origins.shape).contiguous()
    sorted_labels = torch.searchsorted(ends.long(), rows, right=True)
    labels = torch.empty_like(origins).scatter(2, origins, sorted_labels)
    labels[0, :, :num_sinks] = -1
    return labels.transpose(0, 1), codes.transpose(0, 1)


def encode_pages(pages, labels, spreads) -> torch.Tensor:
    """``key_codes.encode`` of many pages.

    Args:
        pages: [num_kv_heads, num_pages, page_size, head_size], keys.
        labels: [num_kv_heads, num_pages, page_size] int64; -1 for no cluster.
        spreads: [num_kv_heads, num_pages, head_size + num_clusters], as the keys.

    Returns:
        [num_kv_heads, num_pages, code_bytes] uint8.
    """
    num_clusters = spreads.shape[2] - pages.shape[3]

    def encode(keys, of_keys, spread):
        is_member, keys = of_keys >= 0, keys.float()
        keys, of_keys = keys[is_member], of_keys[is_member]
        members = one_hot(of_keys, num_clusters).T.float()
        means = members @ keys / members.sum(1, keepdim=True).clamp(min=1)
        return key_codes.encode(keys, of_keys, means.to(spread.dtype), spread)

    return torch.stack(
        [
            torch.stack([encode(*page) for page in zip(*head, strict=True)])
            for head in zip(pages, labels, spreads, strict=True)
        ]
    )


def label_in_torch(pages: torch.Tensor, method: Ours, num_sinks: int) -> torch.Tensor:
    """The labels as by ``index_by_op``, for all settings and devices."""
    labels = torch.full_like(pages[..., 0], -1, dtype=torch.int64)

    def label(part):
        sets = part.flatten(0, 1).float()
        found = cluster_keys(sets, method.num_clusters, method.num_iters, method.init)
        return found.unflatten(0, part.shape[:2])

    # The sinks make the first page a shorter one.
    labels[:, :1, num_sinks:] = label(pages[:, :1, num_sinks:])
    if pages.shape[1] > 1:
        labels[:, 1:] = label(pages[:, 1:])
    return labels
