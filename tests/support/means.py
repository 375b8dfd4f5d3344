# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Holds means of 4 bits against the exact ones."""

import torch

from vllm_clusterkv import short_means
from vllm_clusterkv.page_layout import IndexFields

FP32_EPS = torch.finfo(torch.float32).eps


def check_means(fields: IndexFields, members: torch.Tensor, rows: torch.Tensor) -> None:
    """The stored means are those of the rows, rounded as ``short_means`` has it.

    Base, deviations and steps follow from the exact means within what fp32 sums and the
    rounding of means to two numbers of the dtype leave, codes from these as stored: the
    nearest, or one less where 16 bits would not be a finite number.

    Args:
        fields: Of some pages, [P, H, ...].
        members: [P, H, C, num_rows] fp32, 1 where a row is of a cluster.
        rows: [P, H, num_rows, 2 * D] fp32.
    """
    counts = members.sum(3)  # [P, H, C]
    means = members @ rows / counts.clamp(min=1)[..., None]
    magnitudes = members @ rows.abs() / counts.clamp(min=1)[..., None]
    dtype = fields.key_base.dtype
    info = torch.finfo(dtype)
    exists = counts > 0
    mean_keys, mean_values = means.chunk(2, -1)
    # What a mean may be off by, at most.
    slack = 32 * FP32_EPS * magnitudes + info.eps**2 * means.abs()
    slack += 4 * info.smallest_normal * info.eps
    key_slack, value_slack = slack.chunk(2, -1)

    number = exists.sum(2).clamp(min=1)[..., None]
    most = key_slack.amax(2)  # [P, H, D]
    base = torch.where(exists[..., None], mean_keys, 0).sum(2) / number
    _near(fields.key_base, base, most)
    off = mean_keys - fields.key_base.float()[:, :, None]
    squares = torch.where(exists[..., None], off, 0).square()
    _near(fields.key_deviations, (squares.sum(2) / number).sqrt(), most)
    scale = fields.key_deviations.float()[:, :, None]
    off = torch.where(scale > 0, off / scale, 0)
    key_slack = torch.where(scale > 0, key_slack / scale, 0)
    _check_codes(fields.key_codes, fields.key_steps, off, key_slack, exists, True)
    _check_codes(
        fields.value_codes, fields.value_steps, mean_values, value_slack, exists, False
    )


def _near(actual, expected, slack) -> None:
    info = torch.finfo(actual.dtype)
    bound = 0.51 * info.eps * expected.abs() + slack
    bound += info.smallest_normal * info.eps
    assert ((actual.float() - expected).abs() <= bound).all()


def _check_codes(packed, steps, off, slack, exists, of_keys) -> None:
    off = torch.where(exists[..., None], off, 0)
    wanted = off.abs().amax(3) / short_means.MIDDLE
    _near(steps, wanted, slack.amax(3) / short_means.MIDDLE)
    assert (steps[~exists] == 0).all()
    num_clusters, head_size = off.shape[2:]
    codes = short_means.unpack(packed, num_clusters, head_size, of_keys)
    step = steps.float()[..., None].clamp(min=1e-38)
    exact = (off / step + short_means.MIDDLE).clamp(0, 15)
    room = (slack / step + 1e-4 * (exact - short_means.MIDDLE).abs() + 1e-4).clamp(
        max=16
    )
    has_step = (steps > 0)[..., None].expand_as(exact)
    more, room = codes - exact, room + 0.5
    # Of 16 bits whose exponent is all ones, the highest nibble is lower by one.
    halves = packed.contiguous().view(torch.int16)
    where = short_means.places(num_clusters, head_size, of_keys).to(packed.device)
    is_lower = (halves & 0x7C00 == 0x6C00)[..., where // 4] & (where % 4 == 3)
    assert (more <= room)[has_step].all()
    assert (more >= -room - is_lower.int())[has_step].all()
    # Finite, and zero where there are no dimensions.
    assert (short_means.pack(codes, of_keys) == packed).all()
