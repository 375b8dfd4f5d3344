# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The byte layout of a semantic page: one vLLM block of one layer with its index.

    page  = [ num_kv_heads ][ block_size rows ][ K | V ]    what vLLM's view shows
    index = [ num_kv_heads ][ index_bytes ], of each head (``IndexFields``):
              codes of mean keys, codes of mean values  (``short_means.py``)
              cluster ends, int16
              steps of keys, radii, steps of values     a number a cluster each
              key base, key deviations, profile         a number a dimension each
    padding to a multiple of 512 bytes

The index lives in the padding that ``page_size_padded`` adds behind the page, so
vLLM allocates, accounts for, shares and recycles it together with the keys it
describes. A recycled page keeps the bytes of its former owner: an index is valid
if, and only if, the page is complete.

Llama-3.1-8B in bf16 (8 KV heads of 128, 32 clusters): K and V 1,048,576 bytes,
index 8 * 5,120 bytes, page 1,089,536 bytes (3.9% more).
"""

from dataclasses import dataclass

import torch

from vllm_clusterkv import short_means

BLOCK_SIZE = 256
"""Tokens a page. Fixed: a page is the unit of clustering and of prefix sharing."""

LINE_ROWS = 8
"""Rows that are recalled from the host together, and their number in a page."""
LINES_PER_PAGE = BLOCK_SIZE // LINE_ROWS

COUNTERS = (
    "found",
    "recalled",
    "left",
    "calls",
    "nanoseconds",
    "mass",
    "mass_samples",
)
"""What ``recall`` counts, in its order."""

MASS_EVERY = 64
"""Tokens: a row with a multiple of so many and one is looked at for its mass."""

MASS_UNIT = 2**-20
"""In which ``recall`` counts mass."""

INDEX_UNIT = 512
"""Bytes that an entry of an ``index_table`` counts; pages are multiples of it."""

CLUSTERS = (16, 32, 64)
"""Numbers of clusters that a page may have."""


@dataclass
class IndexFields:
    """Views of the fields of indexes, ``[num_blocks, num_kv_heads, ...]``.

    C is clusters, D the head size. Numbers are of the pages' dtype.

    Attributes:
        key_codes: [..., code_bytes] uint8, of the mean keys.
        value_codes: Likewise, of the mean values.
        cluster_ends: [..., C] int16. Cluster ``c`` of a page is its rows ``ends[c-1]``
            to ``ends[c] - 1``; the first one begins at row 0, or behind the sinks in a
            request's first page.
        key_steps: [..., C].
        radii: [..., C]. Of each cluster, the root of the mean over the dimensions of
            its keys' variance.
        value_steps: [..., C].
        key_base: [..., D].
        key_deviations: [..., D].
        profile: [..., D]. The keys' variance around their clusters' means, over its
            mean over the dimensions.
    """

    key_codes: torch.Tensor
    value_codes: torch.Tensor
    cluster_ends: torch.Tensor
    key_steps: torch.Tensor
    radii: torch.Tensor
    value_steps: torch.Tensor
    key_base: torch.Tensor
    key_deviations: torch.Tensor
    profile: torch.Tensor

    @classmethod
    def of(
        cls, index: torch.Tensor, head_size: int, dtype: torch.dtype
    ) -> "IndexFields":
        """The fields of indexes.

        Args:
            index: [..., index_bytes] uint8.
            head_size: Elements of a key, and of a value.
            dtype: Of the pages.

        Raises:
            ValueError: An index of such pages has another number of bytes.
        """
        sizes = {PageLayout(1, head_size, c, dtype).index_bytes: c for c in CLUSTERS}
        if index.shape[-1] not in sizes:
            raise ValueError(
                f"index must have {', '.join(map(str, sizes))} bytes a head, "
                f"got {index.shape[-1]}"
            )
        num_clusters = sizes[index.shape[-1]]
        codes = short_means.code_bytes(num_clusters, head_size)
        start, fields = 0, []
        for size, field_dtype in (
            (codes, torch.uint8),
            (codes, torch.uint8),
            (num_clusters, torch.int16),
            *((num_clusters, dtype),) * 3,
            *((head_size, dtype),) * 3,
        ):
            end = start + size * field_dtype.itemsize
            fields.append(index[..., start:end].view(field_dtype))
            start = end
        return cls(*fields)

    @property
    def num_clusters(self) -> int:
        """Clusters a page and KV head."""
        return self.cluster_ends.shape[-1]

    def __getitem__(self, where) -> "IndexFields":
        """The fields of some blocks, or heads."""
        return IndexFields(*(field[where] for field in vars(self).values()))

    @property
    def head_size(self) -> int:
        """Elements of a key, and of a value."""
        return self.profile.shape[-1]

    def mean_keys(self) -> torch.Tensor:
        """[..., C, D] fp32."""
        return short_means.decode_keys(
            self.key_codes, self.key_steps, self.key_base, self.key_deviations
        )

    def mean_values(self) -> torch.Tensor:
        """[..., C, D] fp32."""
        return short_means.decode_values(
            self.value_codes, self.value_steps, self.head_size
        )

    def write_means(
        self, mean_keys: torch.Tensor, mean_values: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Stores the means of clusters.

        Args:
            mean_keys: [..., C, D] fp32.
            mean_values: [..., C, D] fp32.
            counts: [..., C], tokens of each cluster.
        """
        dtype = self.key_base.dtype
        of_keys = short_means.encode_keys(mean_keys, counts, dtype)
        of_values = short_means.encode_values(mean_values, counts, dtype)
        fields = (
            self.key_codes,
            self.key_steps,
            self.key_base,
            self.key_deviations,
            self.value_codes,
            self.value_steps,
        )
        for field, stored in zip(fields, (*of_keys, *of_values), strict=True):
            field[:] = stored


@dataclass(frozen=True)
class PageLayout:
    """Where the fields of one layer's pages are.

    Attributes:
        num_kv_heads: KV heads of this rank.
        head_size: Elements of a key, and of a value.
        num_clusters: Clusters a page and KV head: 16, 32 or 64.
        dtype: Element type of keys and values.
    """

    num_kv_heads: int
    head_size: int
    num_clusters: int
    dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in a page."""
        return self.num_kv_heads * BLOCK_SIZE * 2 * self.head_size * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        """Bytes of a KV head's index of a page."""
        codes = 2 * short_means.code_bytes(self.num_clusters, self.head_size)
        ends = self.num_clusters * torch.int16.itemsize
        numbers = 3 * self.num_clusters + 3 * self.head_size
        return codes + ends + numbers * self.dtype.itemsize

    @property
    def used_bytes(self) -> int:
        """Bytes of a page with its index, but for the padding."""
        return self.kv_bytes + self.num_kv_heads * self.index_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page with its index: vLLM's ``page_size_padded``."""
        return -(-self.used_bytes // INDEX_UNIT) * INDEX_UNIT

    @property
    def entry_bytes(self) -> int:
        """Bytes of a page's index, padding included: an *entry*, where it is apart."""
        return self.page_bytes - self.kv_bytes

    @property
    def entries_per_block(self) -> int:
        """Entries that fit where a block has its keys and values."""
        return self.kv_bytes // self.entry_bytes

    def index_place(self, block_bytes: int, block: int, entry: int | None) -> int:
        """Where an index is: an entry of an ``index_table``.

        Args:
            block_bytes: From block to block.
            block: The page, or, with ``entry``, the block that holds entries.
            entry: Number of the entry; None for the index behind the page.
        """
        place = block * block_bytes
        if entry is not None:
            place += entry * self.entry_bytes - self.kv_bytes
        return place // INDEX_UNIT

    @property
    def overhead(self) -> float:
        """Index bytes as a share of the bytes of keys and values."""
        return self.page_bytes / self.kv_bytes - 1

    def index_view(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The view of the indexes behind the pages of one layer.

        Args:
            kv_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size] dtype.
                vLLM's view of a layer, whose block stride includes the padding.

        Returns:
            [num_blocks, num_kv_heads, index_bytes] uint8.

        Raises:
            ValueError: The view is not one of padded pages in the LBHNC layout.
        """
        num_blocks = kv_cache.shape[0]
        row = 2 * self.head_size
        shape = (num_blocks, self.num_kv_heads, BLOCK_SIZE, row)
        block_stride, *inner_strides = kv_cache.stride()
        block_bytes = block_stride * kv_cache.element_size()
        if (
            kv_cache.shape != shape
            or kv_cache.dtype != self.dtype
            or inner_strides != [BLOCK_SIZE * row, row, 1]
            or block_bytes < self.page_bytes
        ):
            raise ValueError(
                f"kv_cache must be {self.dtype} of shape {shape} in the LBHNC layout "
                f"with pages of at least {self.page_bytes} bytes, got "
                f"{kv_cache.dtype} of shape {tuple(kv_cache.shape)} with strides "
                f"{kv_cache.stride()}"
            )
        return torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(
            kv_cache.untyped_storage(),
            kv_cache.storage_offset() * self.dtype.itemsize + self.kv_bytes,
            (num_blocks, self.num_kv_heads, self.index_bytes),
            (block_bytes, self.index_bytes, 1),
        )
