# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Means of 4 bits an element, as a page's index holds them.

    mean_key[c, d]   = key_base[d] + key_deviation[d] * key_step[c] * (code - 7.5)
    mean_value[c, d] = value_step[c] * (code - 7.5)

The base is the mean of the mean keys of a page's clusters that have tokens, deviations
are those of the mean keys around it, by dimension: keys of some layers have dimensions
many times as large as others. Values have no use for either. A step is a 15th of the
cluster's range. ``docs/quality.md`` has what this costs and gives.

Codes lie in words of 32 bits as a warp on a GPU multiplies them, so that a shift and a
mask make a pair of 16-bit numbers of a word. Dimensions are padded to a multiple of 32.

- Of keys a word has 8 dimensions of a cluster: ``32 s + 8 j + 2 p + h`` in nibble ``p``
  of half ``h``, in word ``j * segments + s`` of the cluster's row.
- Of values a word has 4 dimensions of two clusters: cluster ``16 t + 2 i + h`` and
  dimension ``32 q + 8 p + g`` in nibble ``p`` of half ``h``, in word ``(i, g, q)`` of
  tile ``t``.

Read as numbers of 16 bits, all are finite: with a host tier, indexes lie where rows
will be one day, and FlashAttention multiplies what is behind a request's last row by
zero. Where 16 bits of codes would not be finite, one of the four is lower by one.
"""

import torch

MIDDLE = 7.5
"""The code of nothing: between 7 and 8, so that codes are symmetric."""


def padded_dims(head_size: int) -> int:
    """Dimensions that codes are kept for."""
    return -(-head_size // 32) * 32


def code_bytes(num_clusters: int, head_size: int) -> int:
    """Bytes of a page's mean keys, or mean values, of one KV head."""
    return num_clusters * padded_dims(head_size) // 2


def places(num_clusters: int, head_size: int, of_keys: bool) -> torch.Tensor:
    """Where codes are: number of the nibble, 8 a word, low bits first.

    [num_clusters, head_size] int64.
    """
    segments = padded_dims(head_size) // 32
    c = torch.arange(num_clusters)[:, None]
    d = torch.arange(head_size)
    if of_keys:
        word = (c * 4 + d % 32 // 8) * segments + d // 32
        nibble = d % 8 // 2 + 4 * (d % 2)
    else:
        word = ((c // 16 * 8 + c % 16 // 2) * 8 + d % 8) * segments + d // 32
        nibble = d % 32 // 8 + 4 * (c % 2)
    return 8 * word + nibble


def pack(codes: torch.Tensor, of_keys: bool) -> torch.Tensor:
    """Codes as bytes.

    [..., num_clusters, head_size] int64, 0 to 15 -> [..., code_bytes] uint8, some codes
    lower by one. Codes of padding are 0.
    """
    num_clusters, head_size = codes.shape[-2:]
    where = places(num_clusters, head_size, of_keys).flatten().to(codes.device)
    num_codes = num_clusters * padded_dims(head_size)
    nibbles = codes.new_zeros(*codes.shape[:-2], num_codes)
    nibbles[..., where] = codes.flatten(-2)
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    halves = packed.to(torch.uint8).view(torch.int16)
    # An fp16 number with these bits is not finite; in bf16 it takes more.
    return torch.where(halves & 0x7C00 == 0x7C00, halves & ~0x1000, halves).view(
        torch.uint8
    )


def unpack(
    packed: torch.Tensor, num_clusters: int, head_size: int, of_keys: bool
) -> torch.Tensor:
    """The codes: [..., num_clusters, head_size] int64."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    where = places(num_clusters, head_size, of_keys).to(packed.device)
    return nibbles[..., where].long()


def encode_keys(
    means: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds the mean keys of a page's clusters.

    Args:
        means: [..., num_clusters, head_size] fp32.
        counts: [..., num_clusters]. A cluster without tokens has a step of zero.
        dtype: Of the pages.

    Returns:
        Packed codes; steps [..., num_clusters], base and deviations [..., head_size] in
        ``dtype``.
    """
    exists = counts[..., None] > 0
    number = exists.sum(-2).clamp(min=1)
    base = (torch.where(exists, means, 0).sum(-2) / number).to(dtype)
    off = torch.where(exists, means - base.float()[..., None, :], 0)
    deviations = (off.square().sum(-2) / number).sqrt().to(dtype)
    scale = deviations.float()[..., None, :]
    off = torch.where(scale > 0, off / scale, 0)
    return *_round(off, dtype, of_keys=True), base, deviations


def encode_values(
    means: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds the mean values of a page's clusters: packed codes, and steps.

    Arguments as of ``encode_keys``.
    """
    return _round(torch.where(counts[..., None] > 0, means, 0), dtype, of_keys=False)


def _round(off, dtype, of_keys: bool) -> tuple[torch.Tensor, torch.Tensor]:
    steps = (off.abs().amax(-1) / MIDDLE).to(dtype)
    parts = torch.where(steps[..., None] > 0, off / steps.float()[..., None], 0)
    codes = (parts + MIDDLE).round().clamp(0, 15).long()
    return pack(codes, of_keys), steps


def decode_keys(packed, steps, base, deviations) -> torch.Tensor:
    """Means that ``encode_keys`` rounded: [..., num_clusters, head_size] fp32."""
    num_clusters, head_size = steps.shape[-1], base.shape[-1]
    codes = unpack(packed, num_clusters, head_size, of_keys=True) - MIDDLE
    scale = steps.float()[..., None] * deviations.float()[..., None, :]
    return base.float()[..., None, :] + codes * scale


def decode_values(packed, steps, head_size: int) -> torch.Tensor:
    """Means that ``encode_values`` rounded: [..., num_clusters, head_size] fp32."""
    codes = unpack(packed, steps.shape[-1], head_size, of_keys=False) - MIDDLE
    return codes * steps.float()[..., None]
