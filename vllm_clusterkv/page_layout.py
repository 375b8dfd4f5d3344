# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The byte layout of a semantic page: one vLLM block of one layer with its index.

    page  = [ num_kv_heads ][ block_size rows ][ K | V ]    what vLLM's view shows
    index = [ num_kv_heads ][ mean K | mean V ][ num_clusters ][ head_size ]
            [ num_kv_heads ][ profile of head_size | num_clusters radii ]
            [ num_kv_heads ][ num_clusters ] int16 cluster ends
            [ num_kv_heads ][ codes of keys, bytes (``key_codes.py``) ]
    padding to a multiple of 512 bytes

The index lives in the padding that ``page_size_padded`` adds behind the page, so
vLLM allocates, accounts for, shares and recycles it together with the keys it
describes. A recycled page keeps the bytes of its former owner: an index is valid
if, and only if, the page is complete.

Llama-3.1-8B in bf16 (8 KV heads of 128, 16 clusters): K and V 1,048,576 bytes,
index 65,536 + 2,304 + 256 + 17,408 bytes, page 1,134,080 bytes (8.2% more).
"""

from dataclasses import dataclass

import torch

BLOCK_SIZE = 256
"""Tokens a page. Fixed: a page is the unit of clustering and of prefix sharing."""

TILE_CLUSTERS = 16
"""Clusters that share an entry of ``tile_stats``: neighbours in a row's order."""

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

NUM_STEPS = 16
"""Steps of a page's codes: 16 times as many of its keys have codes at most."""

INDEX_UNIT = 512
"""Bytes that an entry of an ``index_table`` counts; pages are multiples of it."""


def num_tiles(num_clusters: int) -> int:
    """Tiles that hold so many clusters, the last one perhaps in part."""
    return -(-num_clusters // TILE_CLUSTERS)


def num_coded_dims(head_size: int) -> int:
    """Dimensions that a page's codes tell of: a quarter of them, and 16 at least."""
    return 16 if head_size <= 64 else 32 * -(-head_size // 128)


@dataclass(frozen=True)
class PageLayout:
    """Where the fields of one layer's pages are.

    Attributes:
        num_kv_heads: KV heads of this rank.
        head_size: Elements of a key, and of a value.
        num_clusters: Clusters a page and KV head: 8, 16 or 32.
        dtype: Element type of keys, values, means and spreads.
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
    def centroid_bytes(self) -> int:
        """Bytes of the cluster means in a page's index."""
        return (
            self.num_kv_heads
            * self.num_clusters
            * 2
            * self.head_size
            * self.dtype.itemsize
        )

    @property
    def spread_bytes(self) -> int:
        """Bytes of the spreads of keys around their means in a page's index."""
        return (
            self.num_kv_heads
            * (self.head_size + self.num_clusters)
            * self.dtype.itemsize
        )

    @property
    def ends_bytes(self) -> int:
        """Bytes of the cluster ends in a page's index."""
        return self.num_kv_heads * self.num_clusters * torch.int16.itemsize

    @property
    def code_bytes(self) -> int:
        """Bytes of a KV head's codes of keys in a page's index."""
        return num_coded_dims(self.head_size) * (
            self.dtype.itemsize + torch.int16.itemsize + 4 * NUM_STEPS
        )

    @property
    def used_bytes(self) -> int:
        """Bytes of a page with its index, but for the padding."""
        index_bytes = self.centroid_bytes + self.spread_bytes + self.ends_bytes
        return self.kv_bytes + index_bytes + self.num_kv_heads * self.code_bytes

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

    def index_views(
        self, kv_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the index areas behind the pages of one layer.

        Args:
            kv_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size] dtype.
                vLLM's view of a layer, whose block stride includes the padding.

        Returns:
            centroids: [num_blocks, num_kv_heads, 2, num_clusters, head_size] dtype.
                Of each head all mean keys, then all mean values.
            spreads: [num_blocks, num_kv_heads, head_size + num_clusters] dtype. Of each
                head the profile, then the clusters' radii.
            cluster_ends: [num_blocks, num_kv_heads, num_clusters] int16.
            codes: [num_blocks, num_kv_heads, code_bytes] uint8.

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
            or block_bytes % self.dtype.itemsize
        ):
            raise ValueError(
                f"kv_cache must be {self.dtype} of shape {shape} in the LBHNC layout "
                f"with pages of at least {self.page_bytes} bytes, got "
                f"{kv_cache.dtype} of shape {tuple(kv_cache.shape)} with strides "
                f"{kv_cache.stride()}"
            )
        offset = kv_cache.storage_offset() + self.kv_bytes // self.dtype.itemsize
        centroids = kv_cache.as_strided(
            (
                num_blocks,
                self.num_kv_heads,
                2,
                self.num_clusters,
                self.head_size,
            ),
            (
                block_stride,
                self.num_clusters * row,
                self.num_clusters * self.head_size,
                self.head_size,
                1,
            ),
            offset,
        )
        spread_size = self.head_size + self.num_clusters
        spreads = kv_cache.as_strided(
            (num_blocks, self.num_kv_heads, spread_size),
            (block_stride, spread_size, 1),
            offset + self.centroid_bytes // self.dtype.itemsize,
        )
        ends_offset = offset * self.dtype.itemsize + self.centroid_bytes
        ends_offset += self.spread_bytes
        storage, device = kv_cache.untyped_storage(), kv_cache.device
        cluster_ends = torch.empty(0, dtype=torch.int16, device=device).set_(
            storage,
            ends_offset // torch.int16.itemsize,
            (num_blocks, self.num_kv_heads, self.num_clusters),
            (block_bytes // torch.int16.itemsize, self.num_clusters, 1),
        )
        codes = torch.empty(0, dtype=torch.uint8, device=device).set_(
            storage,
            ends_offset + self.ends_bytes,
            (num_blocks, self.num_kv_heads, self.code_bytes),
            (block_bytes, self.code_bytes, 1),
        )
        return centroids, spreads, cluster_ends, codes
