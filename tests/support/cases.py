# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Named tables of shapes: regular ones, odd ones and the corners."""

from dataclasses import dataclass

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
INT_MAX = 2**31 - 1

CUDA_DTYPES = (BF16, FP16)
CUDA_HEAD_SIZES = (64, 96, 128, 256)
CUDA_MAX_GROUP = 16


def finest_dtype(device: str) -> torch.dtype:
    """The dtype of least rounding that the ops take on a device."""
    return FP32 if device == "cpu" else FP16


@dataclass(frozen=True)
class DecodeCase:
    """One batch of decode rows over semantic pages.

    Attributes:
        seq_lens: Tokens of each row; 0 is a padding row.
        group: Query heads a KV head.
        num_parts: Parts that ``score_clusters`` deals a row's pages to.
        num_splits: Parts that ``sparse_decode`` splits a row into.
        min_sparse_lens: Of each row; none for rows that are all sparse.
    """

    seq_lens: tuple[int, ...]
    dtype: torch.dtype = BF16
    head_size: int = 64
    num_kv_heads: int = 2
    group: int = 4
    tokens_per_cluster: int = 8
    num_sink_tokens: int = 16
    token_budget: int = 100
    num_parts: int = 3
    num_splits: int = 2
    min_sparse_lens: tuple[int, ...] = ()

    def __str__(self) -> str:
        dtype = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[self.dtype]
        lens = "+".join(map(str, self.seq_lens)) or "none"
        if self.min_sparse_lens:
            lens += "-m" + "+".join(map(str, self.min_sparse_lens))
        return (
            f"{lens}-{dtype}-d{self.head_size}-h{self.num_kv_heads}x{self.group}"
            f"-c{self.tokens_per_cluster}-s{self.num_sink_tokens}-b{self.token_budget}"
            f"-p{self.num_parts}-n{self.num_splits}"
        )


REGULAR = [
    DecodeCase((700, 513), dtype=dtype, head_size=head_size)
    for dtype in DTYPES
    for head_size in (64, 96, 128, 256)
]

IRREGULAR = [
    DecodeCase((1500, 0, 257), FP16, head_size=80, num_parts=1, num_splits=3),
    DecodeCase((1500, 0, 257), FP16, head_size=96, num_parts=1, num_splits=3),
    DecodeCase((600,), FP16, group=1, num_kv_heads=3, num_parts=2, num_splits=1),
    DecodeCase((600, 530), group=3, tokens_per_cluster=4, token_budget=250),
    DecodeCase((900, 300), FP32, group=7, num_sink_tokens=0, tokens_per_cluster=16),
    DecodeCase((900, 300), group=7, num_sink_tokens=0, tokens_per_cluster=16),
    DecodeCase((600,), group=16, num_kv_heads=1, num_sink_tokens=0, num_splits=7),
    DecodeCase(
        (1029, 517, 1285),
        FP16,
        tokens_per_cluster=4,
        num_sink_tokens=1,
        num_parts=2,
    ),
    DecodeCase(
        (1537, 1536), head_size=128, num_sink_tokens=128, num_parts=16, num_splits=16
    ),
]

CORNER = [
    DecodeCase((0, 1, 2, 255, 256, 257), FP32, group=1),
    DecodeCase((0, 1, 2, 255, 256, 257), FP16, group=1),
    DecodeCase((511, 512, 513, 0), FP16, group=2),
    DecodeCase((256, 257, 258), num_sink_tokens=0, num_parts=1, num_splits=5),
    DecodeCase((0, 0)),
    DecodeCase(()),
    DecodeCase((700, 1300), FP32, token_budget=1, num_parts=4),
    DecodeCase((700, 1300), FP16, token_budget=1, num_parts=4),
    DecodeCase((769,), FP16, token_budget=3 * 256 - 16),  # exactly the clustered tokens
    DecodeCase((769,), FP16, token_budget=3 * 256 - 17),
    DecodeCase((769, 3), FP16, token_budget=10**6),
]

DENSE = [  # at least one dense row
    DecodeCase((700, 700, 0), min_sparse_lens=(700, 701, 700)),
    DecodeCase((700, 1300, 600), FP32, min_sparse_lens=(2**30, 1301, 600)),
    DecodeCase((1, 255, 256, 257, 512, 513), FP16, min_sparse_lens=(INT_MAX,) * 6),
    DecodeCase(
        (0, 1, 257, 1537),
        min_sparse_lens=(0, 2, 258, 1537),
        head_size=128,
        num_parts=40,
    ),
    DecodeCase((1536, 900), FP16, group=16, min_sparse_lens=(INT_MAX, 900)),
    DecodeCase((1100, 40), group=3, num_splits=7, min_sparse_lens=(1101, 41)),
]

ALL = REGULAR + IRREGULAR + CORNER + DENSE


@dataclass(frozen=True)
class IndexCase:
    """Complete pages to index; ``num_sink_tokens`` has one entry a page."""

    num_sink_tokens: tuple[int, ...] = (16, 0)
    dtype: torch.dtype = BF16
    head_size: int = 64
    num_kv_heads: int = 2
    tokens_per_cluster: int = 8

    def __str__(self) -> str:
        dtype = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[self.dtype]
        sinks = "+".join(map(str, self.num_sink_tokens))
        return (
            f"s{sinks}-{dtype}-d{self.head_size}-h{self.num_kv_heads}"
            f"-c{self.tokens_per_cluster}"
        )


INDEX = [
    IndexCase(),
    IndexCase(dtype=FP16, tokens_per_cluster=4),
    IndexCase(dtype=FP32, tokens_per_cluster=16),
    IndexCase(tokens_per_cluster=16),
    IndexCase((0, 0, 16), head_size=80, num_kv_heads=1),
    IndexCase((1, 128), FP16, head_size=96, num_kv_heads=3),
    IndexCase((16,), head_size=128, tokens_per_cluster=4),
    IndexCase((16,), FP32, head_size=256),
    IndexCase((0, 7), head_size=256, tokens_per_cluster=4),
    IndexCase((255, 0), head_size=256),  # one row to cluster
]
