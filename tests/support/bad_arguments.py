# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Arguments that csrc/checks.h rejects, as (name, how to spoil it, message).

``spoil`` maps a valid argument to an invalid one. The tables are shared by the
tests of the ops that share the check; an op's own arguments are in its test file.
"""

import pytest
import torch


def rejected(op, args: dict, name: str, spoil, message: str) -> None:
    """Asserts that ``op`` raises ``message`` once ``args[name]`` is spoilt."""
    with pytest.raises(RuntimeError, match=message):
        op(**{**args, name: spoil(args[name])})


def flattened(t):
    return t.flatten()


def doubled(t):
    """Wrong dtype: every op takes at most 32 bits."""
    return t.double() if t.is_floating_point() else t.long()


def transposed(t):
    """Right shape, but the last dimension is not dense."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def longer(dim):
    """One more element along ``dim``."""
    return lambda t: torch.cat([t, t.narrow(dim, 0, 1)], dim)


def padded(t):
    """Right shape, dense rows, but gaps between them."""
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def with_size(dim, size):
    def spoil(t):
        shape = list(t.shape)
        shape[dim] = size
        return t.new_zeros(shape)

    return spoil


def with_odd_strides(t):
    """A view whose rows are an odd number of bytes apart."""
    wide = t.new_zeros((*t.shape[:-1], t.shape[-1] + 1))
    return wide[..., :-1]


PAGES = [
    ("kv_cache", flattened, r"kv_cache must have 4 dimensions, got 1"),
    ("index", flattened, r"index must have 3 dimensions, got 1"),
    ("kv_cache", doubled, r"must have dtype BFloat16, Half or Float, got Double"),
    ("index", doubled, r"index must have dtype Byte, got Long"),
    ("kv_cache", with_size(1, 0), r"size\(1\), the KV heads, must be at least 1"),
    ("kv_cache", with_size(2, 257), r"size\(2\).* must be 1 to 256 tokens, got 257"),
    ("kv_cache", with_size(2, 0), r"size\(2\).* must be 1 to 256 tokens, got 0"),
    ("kv_cache", longer(3), r"kv_cache.size\(3\) must be 2 \* head_size, .* got 129"),
    (
        "kv_cache",
        with_size(3, 0),
        r"kv_cache.size\(3\) must be 2 \* head_size, .* got 0",
    ),
    ("kv_cache", with_size(3, 520), r"kv_cache.size\(3\) must be .* at most 256"),
    ("index", longer(0), r"index.size\(0\) must equal num_blocks"),
    ("index", longer(1), r"index.size\(1\) must equal num_kv_heads"),
    ("index", longer(2), r"index.size\(2\) must be \d+, \d+ or \d+, the bytes of 16"),
    ("kv_cache", transposed, r"kv_cache must be dense in its last dimension"),
    ("index", transposed, r"index must be dense in its last dimension"),
    ("index", with_odd_strides, r"index must be at a multiple of 4 bytes"),
]

ROWS = [
    ("block_table", flattened, r"block_table must have 2 dimensions, got 1"),
    ("seq_lens", lambda t: t[None], r"seq_lens must have 1 dimensions, got 2"),
    ("block_table", doubled, r"block_table must have dtype Int, got Long"),
    ("seq_lens", doubled, r"seq_lens must have dtype Int, got Long"),
    ("min_sparse_lens", lambda t: t[None], r"min_sparse_lens must have 1 dimensions"),
    ("min_sparse_lens", doubled, r"min_sparse_lens must have dtype Int, got Long"),
    ("min_sparse_lens", longer(0), r"min_sparse_lens.size\(0\) must equal num_reqs"),
    ("min_sparse_lens", lambda t: t.repeat(2)[::2], r"min_sparse_lens must be dense"),
    ("block_table", longer(0), r"block_table.size\(0\) must equal num_reqs \(2\)"),
    ("block_table", transposed, r"block_table must be dense in its last dimension"),
    ("seq_lens", lambda t: t.repeat(2)[::2], r"seq_lens must be dense .* stride 2"),
]

QUERY = [
    ("query", flattened, r"query must have 3 dimensions, got 1"),
    ("query", doubled, r"query must have dtype BFloat16, got Double"),
    ("query", longer(2), r"query.size\(2\) must equal head_size \(64\), got 65"),
    ("query", transposed, r"query must be dense in its last dimension, got stride"),
    ("query", longer(0), r"query.size\(0\) must equal num_reqs \(2\), got 3"),
    ("query", longer(1), r"num_heads must be a multiple of num_kv_heads \(2\), got 5"),
    ("query", with_size(1, 0), r"num_heads must be a multiple of num_kv_heads .* 0"),
]


SOFTMAX_SUMS = [
    ("softmax_sums", flattened, r"softmax_sums must have 4 dimensions, got 1"),
    ("softmax_sums", doubled, r"softmax_sums must have dtype Float, got Double"),
    ("softmax_sums", longer(0), r"softmax_sums.size\(0\) must equal num_reqs \(2\)"),
    ("softmax_sums", longer(1), r"softmax_sums.size\(1\) must equal num_heads \(4\)"),
    (
        "softmax_sums",
        with_size(2, 0),
        r"softmax_sums.size\(2\), the parts, must be at least 1",
    ),
    ("softmax_sums", longer(3), r"softmax_sums.size\(3\) must equal max and sum"),
    ("softmax_sums", padded, r"softmax_sums must be contiguous"),
]


def per_cluster(name: str, dtype: str) -> list:
    """Bad values of ``scores`` or ``selected``."""
    return [
        (name, flattened, rf"{name} must have 3 dimensions, got 1"),
        (name, lambda t: t.short(), rf"{name} must have dtype {dtype}, got Short"),
        (name, longer(0), rf"{name}.size\(0\) must equal num_reqs \(2\), got 3"),
        (name, longer(2), rf"{name}.size\(2\) must equal max_blocks \* num_clusters"),
        (name, padded, rf"{name} must be contiguous"),
    ]
