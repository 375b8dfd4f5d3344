# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The product: semantic pages (``vllm_clusterkv``), with and without the tail estimate.

When a page of 256 tokens is full, each KV head's keys are clustered within it. Clusters
of all full pages are ranked by the query heads' softmax weights a token and taken until
the budget is reached. Means are of 4 bits an element (``vllm_clusterkv.short_means``).

With the product's settings clusters come from ``ops.index_pages``, the kernel that
serving runs, with others from ``kmeans.cluster_keys``, the same in PyTorch. The order
is ``reference.rank_weights``.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn.functional import one_hot

from benchmarks.quality.methods.base import BYTES_PER_ELEMENT
from benchmarks.quality.methods.groups import (
    GroupedIndex,
    GroupedMethod,
    count_labels,
)
from benchmarks.quality.methods.kmeans import check_init, cluster_keys
from vllm_clusterkv import ops, reference, short_means
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE, CLUSTERS, IndexFields, PageLayout
from vllm_clusterkv.requirements import CUDA_HEAD_SIZES, HEAD_SIZES

_END_BYTES = 2
"""Where a cluster ends in its page, an int16."""


@dataclass(frozen=True)
class Ours(GroupedMethod):
    """Settings; the defaults are the product's.

    Attributes:
        tokens_per_cluster: Average tokens a cluster. Divides ``page_size``.
        num_iters: Rounds of k-means.
        init: Keys that start the clusters; one of ``kmeans.INITS``.
        spread: Whether scores know how far keys are from the means of their clusters.
        mean_bits: Bits of an element of a cluster's mean key and value: 4, as the
            product has them, or 16. Of 4 bits a page needs a multiple of 16 clusters.
    """

    tail: bool = True
    tokens_per_cluster: int = ClusterKVConfig.tokens_per_cluster
    num_iters: int = ClusterKVConfig.num_iters
    init: str = "farthest"
    spread: bool = True
    mean_bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(self.init)
        if self.page_size % self.tokens_per_cluster:
            raise ValueError(
                f"tokens_per_cluster must divide the page of {self.page_size} tokens, "
                f"got {self.tokens_per_cluster}"
            )
        if self.mean_bits not in (4, 16):
            raise ValueError(f"mean_bits must be 4 or 16, got {self.mean_bits}")
        if self.mean_bits == 4 and self.num_clusters % 16:
            raise ValueError(
                "mean_bits must be 16 where page_size over tokens_per_cluster is not a "
                f"multiple of 16, got 4 with {self.num_clusters} clusters"
            )

    @property
    def num_clusters(self) -> int:
        """Clusters a page and KV head."""
        return self.page_size // self.tokens_per_cluster

    def index(self, scale: float) -> "OursIndex":
        return OursIndex(self, scale)


class OursIndex(GroupedIndex):
    """Clusters of each full page before the last one. Means of 4 bits are in fp32.

    Attributes:
        profiles: [num_kv_heads, num_pages, head_size], as the keys; or None.
        radii: [num_kv_heads, num_pages, num_clusters], likewise.
    """

    method: Ours

    def __init__(self, method: Ours, scale: float) -> None:
        super().__init__(method, scale)
        self.profiles: torch.Tensor | None = None
        self.radii: torch.Tensor | None = None

    def _form_groups(self, keys, values) -> None:
        method, start = self.method, self.labels.shape[1]
        end = method.last_page_start(self.seq_len)
        if end == start:
            return
        keys, values = keys[:, start:end], values[:, start:end]
        # [num_kv_heads, num_pages, page_size, head_size]
        pages = keys.unflatten(1, (-1, method.page_size))
        sinks = method.num_sink_tokens if start == 0 else 0
        make_labels = label_by_op if has_kernel(pages, method) else label_in_torch
        labels = make_labels(pages, method, sinks)
        if method.spread:
            profiles, radii = page_spreads(pages, labels, method.num_clusters)
            if self.profiles is not None and self.radii is not None:
                profiles = torch.cat([self.profiles, profiles], 1)
                radii = torch.cat([self.radii, radii], 1)
            self.profiles, self.radii = profiles, radii
        page = torch.arange(pages.shape[1], device=keys.device)[:, None]
        in_row = torch.where(labels < 0, -1, labels + page * method.num_clusters)
        num_groups = pages.shape[1] * method.num_clusters
        if method.mean_bits == 16:
            self._append(keys, values, in_row.flatten(1), num_groups)
            return
        # In fp32, as the product has means before and after they are codes: 16 bits
        # of a mean far from zero say less than its code.
        self._append(keys.float(), values.float(), in_row.flatten(1), num_groups)
        counts = count_labels(in_row.flatten(1), num_groups)
        counts = counts.unflatten(1, (-1, method.num_clusters))
        for means, shorten in (
            (self.mean_keys, short_keys),
            (self.mean_values, short_values),
        ):
            new = means[:, -num_groups:].unflatten(1, (-1, method.num_clusters))
            new.copy_(shorten(new, counts, keys.dtype))

    def _scores(self, query) -> torch.Tensor:
        of_mean = super()._scores(query)
        if self.profiles is None or self.radii is None:
            return of_mean
        # [num_kv_heads, group, num_pages, num_clusters]
        squares = reference.query_squares(query)[:, :, None]
        spread = SimpleNamespace(
            profile=self.profiles[:, None], radii=self.radii[:, None]
        )
        added = reference.spread_score(squares, spread, self.scale)
        return of_mean + added.flatten(2)

    def _index_bytes(self, num_groups, num_selected) -> float | torch.Tensor:
        scanned = super()._index_bytes(num_groups, num_selected)
        head_size, num_clusters = self.mean_keys.shape[2], self.method.num_clusters
        num_pages = num_groups // num_clusters
        if self.method.mean_bits == 4:
            codes = short_means.code_bytes(num_clusters, head_size)
            # Steps; base and deviations.
            numbers = num_clusters + 2 * head_size
            scanned = num_pages * (codes + BYTES_PER_ELEMENT * numbers)
        if self.method.spread:
            scanned += num_pages * BYTES_PER_ELEMENT * (head_size + num_clusters)
        return scanned + _END_BYTES * num_groups

    def _mean_value_bytes(self) -> float | None:
        if self.method.mean_bits == 16:
            return None
        return short_means.code_bytes(1, self.mean_keys.shape[2]) + BYTES_PER_ELEMENT


def short_keys(means, counts, dtype) -> torch.Tensor:
    """Mean keys as they are stored in 4 bits an element.

    Args:
        means: [..., num_pages, num_clusters, head_size] fp32.
        counts: [..., num_pages, num_clusters] int64.
        dtype: Of the keys.
    """
    return short_means.decode_keys(*short_means.encode_keys(means, counts, dtype))


def short_values(means, counts, dtype) -> torch.Tensor:
    """Likewise mean values."""
    coded = short_means.encode_values(means, counts, dtype)
    return short_means.decode_values(*coded, means.shape[-1])


def page_spreads(pages, labels, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference.key_spread`` of many pages, rounded as stored.

    Args:
        pages: [num_kv_heads, num_pages, page_size, head_size], keys.
        labels: [num_kv_heads, num_pages, page_size] int64; -1 for no cluster.
        num_clusters: Of a page.

    Returns:
        profiles: [num_kv_heads, num_pages, head_size], as the keys.
        radii: [num_kv_heads, num_pages, num_clusters], as the keys.
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
    return profile.to(pages.dtype), radii.to(pages.dtype)


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
        and method.num_clusters in CLUSTERS
        and pages.shape[3] in head_sizes
        and pages.dtype in dtypes
    )


def label_by_op(pages: torch.Tensor, method: Ours, num_sinks: int) -> torch.Tensor:
    """The cluster in its page of each row, by the product's kernel.

    Args:
        pages: [num_kv_heads, num_pages, page_size, head_size], keys.
        method: Settings.
        num_sinks: Rows at the start of the first page that are in no cluster.

    Returns:
        [num_kv_heads, num_pages, page_size] int64; -1 for the sinks.
    """
    num_kv_heads, num_pages, num_rows, head_size = pages.shape
    num_clusters, device = method.num_clusters, pages.device
    cache = pages.new_zeros((num_pages, num_kv_heads, num_rows, 2 * head_size))
    cache[..., :head_size] = pages.transpose(0, 1)
    # The op sorts rows with their values, which clustering does not look at: let the
    # first element of the value say where the row was. 16 bits can tell 256 rows.
    position = torch.arange(num_rows, device=device)
    cache[..., head_size] = position.to(pages.dtype)
    layout = PageLayout(num_kv_heads, head_size, num_clusters, pages.dtype)
    index = torch.empty(
        (num_pages, num_kv_heads, layout.index_bytes), dtype=torch.uint8, device=device
    )
    sinks = torch.zeros(num_pages, dtype=torch.int32, device=device)
    sinks[0] = num_sinks
    blocks = torch.arange(num_pages, dtype=torch.int32, device=device)
    ops.index_pages(cache, index, blocks, sinks, method.num_iters)
    ends = IndexFields.of(index, head_size, pages.dtype).cluster_ends
    origins = cache[..., head_size].long()  # [num_pages, num_kv_heads, page_size]
    rows = position.expand(origins.shape).contiguous()
    sorted_labels = torch.searchsorted(ends.long().contiguous(), rows, right=True)
    labels = torch.empty_like(origins).scatter(2, origins, sorted_labels)
    labels[0, :, :num_sinks] = -1
    return labels.transpose(0, 1)


def label_in_torch(pages: torch.Tensor, method: Ours, num_sinks: int) -> torch.Tensor:
    """The labels as by ``label_by_op``, for all settings and devices."""
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
