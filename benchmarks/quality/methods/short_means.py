# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Means of 4 bits an element, as a page's index is to hold them (docs/short-means.md).

    mean_key[c, d]   = key_base[d] + deviation[d] * key_step[c] * (code - 7.5)
    mean_value[c, d] = value_base[d] + value_step[c] * (code - 7.5)

Bases are the means of a page's means, deviations those of the mean keys around theirs,
by dimension: keys of some layers have dimensions many times as large as others. A step
is a 15th of the cluster's range. ``docs/quality.md`` has why.

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

    [..., num_clusters, head_size] int64, 0 to 15 -> [..., num_clusters *
    padded_dims(head_size) / 2] uint8, some codes lower by one.
    """
    num_clusters, head_size = codes.shape[-2:]
    where = places(num_clusters, head_size, of_keys).flatten().to(codes.device)
    nibbles = codes.new_zeros(*codes.shape[:-2], num_clusters * padded_dims(head_size))
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


def encode(
    means: torch.Tensor, dtype: torch.dtype, of_keys: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds the means of a page's clusters.

    Args:
        means: [..., num_clusters, head_size] fp32.
        dtype: Of the pages.
        of_keys: Whether dimensions have deviations.

    Returns:
        Packed codes; steps [..., num_clusters], base and deviations [..., head_size] in
        ``dtype``. Deviations of values are ones, and not kept.
    """
    base = means.mean(-2).to(dtype)
    off = means - base.float()[..., None, :]
    deviations = torch.ones_like(base)
    if of_keys:
        deviations = off.square().mean(-2).sqrt().to(dtype)
        scale = deviations.float()[..., None, :]
        off = torch.where(scale > 0, off / scale, 0)
    steps = (off.abs().amax(-1) / MIDDLE).to(dtype)
    parts = off / steps.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = (parts + MIDDLE).round().clamp(0, 15).long()
    return pack(codes, of_keys), steps, base, deviations


def decode(packed, steps, base, deviations, of_keys: bool) -> torch.Tensor:
    """Means that ``encode`` rounded: [..., num_clusters, head_size] fp32."""
    num_clusters, head_size = steps.shape[-1], base.shape[-1]
    codes = unpack(packed, num_clusters, head_size, of_keys) - MIDDLE
    scale = steps.float()[..., None] * deviations.float()[..., None, :]
    return base.float()[..., None, :] + codes * scale
