# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Codes of keys: what a page's index knows of the keys that a mean hides.

A cluster's mean does not show the one key among sixteen that a query asks for. So those
of its keys that are farthest from it have 2 bits for each of the dimensions in which
the page's keys spread most:

    key[d] = mean[d] + radius * deviation[d] * STEP * (2 * code - 3), about

``docs/quality.md`` has how many keys, dimensions and bits, and why.

The codes of a page and KV head are bytes: ``num_coded_dims`` deviations in the pages'
dtype, as many dimensions, int16, and ``NUM_STEPS`` *steps* of 16 *columns*. Of
pages with 16 clusters a column is a cluster, and a step has a key of each. With 8, the
last 8 columns have further keys of the same clusters; with 32, the first half of the
steps has the first 16. A cluster with fewer keys has some of them again.

Read as numbers of the pages' dtype, all of it is finite: with a host tier, indexes
lie where rows will be one day, and FlashAttention multiplies what is behind a request's
last row by zero. Where 16 bits of codes would not be finite, one of the eight is lower.

Steps lie as a warp on a GPU multiplies them (``place``). Plain PyTorch; kernels have
their own.
"""

import torch

from vllm_clusterkv.page_layout import NUM_STEPS, num_coded_dims

STEP = 0.4978
"""Half of the distance between levels, in deviations: of four levels at equal steps
those that tell a normal variable best (Max, Quantizing for minimum distortion)."""

LARGEST_WEIGHT = 65504.0
"""fp16's largest number: weights of dimensions are rounded to fp16."""


def num_coded_keys(num_clusters: int) -> int:
    """Keys of a cluster that have codes, at most."""
    return 16 * NUM_STEPS // num_clusters


def coded_dims(profile: torch.Tensor) -> torch.Tensor:
    """The dimensions of the largest profile, ties to the lowest; ascending.

    [..., head_size] fp32 -> [..., num_coded_dims] int64.
    """
    order = profile.sort(dim=-1, descending=True, stable=True).indices
    return order[..., : num_coded_dims(profile.shape[-1])].sort(dim=-1).values


def levels_of(off: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The code nearest to each difference.

    Args:
        off: fp32, keys less their means.
        steps: fp32, the distance between levels. Broadcasts.

    Returns:
        int64, 0 to 3.
    """
    return (off >= -steps).long() + (off >= 0).long() + (off >= steps).long()


def place(num_clusters: int, num_dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the two bits of each cluster, key and dimension are.

    Lane ``4 g + j`` of a warp multiplies of a step the columns ``g`` and ``g + 8`` with
    dimensions ``j * num_dims / 4`` on, four at a time. Two such fours share a word,
    so that a shift and a mask make pairs of 16-bit numbers of it, and a lane's words
    are a multiple of 16 bytes.

    Returns:
        byte, shift: [num_clusters, num_coded_keys, num_dims] int64, from the first
        step's first byte, and within the byte.
    """
    cluster = torch.arange(num_clusters)[:, None, None]
    key = torch.arange(num_coded_keys(num_clusters))[:, None]
    i = torch.arange(num_dims)
    steps_a_tile = num_coded_keys(num_clusters) if num_clusters > 8 else NUM_STEPS
    step = cluster // 16 * steps_a_tile + key % steps_a_tile
    column = cluster % 16 + 8 * (key // steps_a_tile)
    lane = column % 8 * 4 + i // (num_dims // 4)
    four = step * (num_dims // 16) + i % (num_dims // 4) // 4
    word, pair = four // 2, i % 4 // 2
    word_byte = (word // 4 * 32 + lane) * 16 + word % 4 * 4
    byte = word_byte + 2 * (i % 2) + column // 8
    return byte, (4 * (four % 2) + 2 * pair).expand(byte.shape)


def encode(
    keys: torch.Tensor, labels: torch.Tensor, means: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """The codes of a page and KV head.

    Args:
        keys: [num_rows, head_size] fp32.
        labels: [num_rows] int64.
        means: [num_clusters, head_size], mean keys as stored.
        spread: [head_size + num_clusters], as stored.

    Returns:
        [bytes] uint8.
    """
    num_clusters, head_size = means.shape
    profile, radii = spread.float().tensor_split([head_size])
    dims = coded_dims(profile)
    # In fp32 PyTorch's root may be off by a bit.
    deviations = profile[dims].double().sqrt().float().to(spread.dtype)
    steps = 2 * STEP * deviations.float() * radii[labels, None]
    rows = levels_of((keys - means.float()[labels])[:, dims], steps)
    outer = ((rows == 0) | (rows == 3)).sum(1)
    num_keys = num_coded_keys(num_clusters)
    codes = rows.new_zeros(num_clusters, num_keys, len(dims))
    for c in range(num_clusters):
        members = torch.nonzero(labels == c)[:, 0]
        if len(members):
            far = outer[members].sort(descending=True, stable=True).indices
            again = torch.arange(num_keys, device=keys.device) % min(len(far), num_keys)
            codes[c] = rows[members[far[again]]]
    byte, shift = (where.to(keys.device) for where in place(num_clusters, len(dims)))
    packed = codes.new_zeros(4 * NUM_STEPS * len(dims))
    packed.index_put_((byte,), codes << shift, accumulate=True)
    halves = packed.byte().view(torch.int16)
    # An fp16 number with these bits is not finite; in bf16 and fp32 it takes more.
    halves[halves & 0x7C00 == 0x7C00] &= ~0x4000
    parts = (deviations, dims.short(), halves)
    return torch.cat([part.view(torch.uint8) for part in parts])


def decode(
    codes: torch.Tensor, num_clusters: int, head_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What codes say.

    Args:
        codes: [..., bytes] uint8.
        dtype: Of the pages.

    Returns:
        dims: [..., num_coded_dims] int64.
        deviations: As dims, fp32.
        signed: [..., num_clusters, num_coded_keys, num_coded_dims] fp32: -3, -1, 1, 3.
    """
    num_dims = num_coded_dims(head_size)
    ends = (num_dims * dtype.itemsize, num_dims * (dtype.itemsize + 2))
    parts = codes.tensor_split(ends, -1)
    deviations = parts[0].contiguous().view(dtype).float()
    dims = parts[1].contiguous().view(torch.int16).long()
    byte, shift = (where.to(codes.device) for where in place(num_clusters, num_dims))
    numbers = (parts[2].int()[..., byte] >> shift) & 3
    return dims, deviations, (2 * numbers - 3).float()


def best_key(
    query: torch.Tensor,
    decoded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    radii: torch.Tensor,
) -> torch.Tensor:
    """By how much the best coded key's product with a query exceeds its mean's.

    Args:
        query: [..., head_size].
        decoded: From ``decode``, perhaps with ``signed`` of another dtype; the first
            dimensions broadcast with the query's.
        radii: [..., num_clusters] fp32.

    Returns:
        [..., num_clusters] fp32.
    """
    dims, deviations, signed = decoded
    shape = torch.broadcast_shapes(query.shape[:-1], dims.shape[:-1])
    asked = query.float().expand(*shape, query.shape[-1])
    asked = asked.gather(-1, dims.expand(*shape, dims.shape[-1]))
    weights = (asked * deviations).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT).half().float()
    # [..., num_clusters, num_coded_keys]
    products = (signed.float() @ weights[..., None, :, None])[..., 0]
    return STEP * radii * products.amax(-1)
