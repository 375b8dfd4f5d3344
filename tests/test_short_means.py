# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Means of 4 bits: where codes are, and how far they are off."""

import pytest
import torch

from vllm_clusterkv import short_means
from vllm_clusterkv.page_layout import CLUSTERS

SHAPES = [
    pytest.param(head_size, num_clusters, id=f"d{head_size}-c{num_clusters}")
    for head_size in (32, 80, 128, 256)
    for num_clusters in CLUSTERS
]


def example(head_size, num_clusters):
    """Means whose dimensions differ; one is always the same."""
    torch.manual_seed(0)
    scales = torch.linspace(0, 30, head_size)
    means = 5 + scales * torch.randn(3, 2, num_clusters, head_size)
    return means, torch.ones(3, 2, num_clusters)


@pytest.mark.parametrize("of_keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize(("head_size", "num_clusters"), SHAPES)
def test_every_code_has_a_place(head_size, num_clusters, of_keys):
    where = short_means.places(num_clusters, head_size, of_keys)
    num_codes = 2 * short_means.code_bytes(num_clusters, head_size)
    assert where.unique().numel() == num_clusters * head_size
    assert where.min() >= 0 and where.max() < num_codes
    codes = torch.randint(8, (2, num_clusters, head_size))  # finite as they are
    packed = short_means.pack(codes % 7, of_keys)
    unpacked = short_means.unpack(packed, num_clusters, head_size, of_keys)
    assert torch.equal(unpacked, codes % 7)
    filled = torch.zeros(num_codes, dtype=torch.bool)
    filled[where.flatten()] = True
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    assert (nibbles[:, ~filled] == 0).all()


@pytest.mark.parametrize(("head_size", "num_clusters"), SHAPES)
def test_keys_are_near(head_size, num_clusters):
    means, counts = example(head_size, num_clusters)
    coded = short_means.encode_keys(means, counts, torch.bfloat16)
    packed, steps, _, deviations = coded
    assert packed.shape == (3, 2, short_means.code_bytes(num_clusters, head_size))
    off = (short_means.decode_keys(*coded) - means).abs()
    steps = steps.float()[..., None] * deviations.float()[..., None, :]
    # Half a step, a whole one more where codes would not be finite.
    assert (off <= 1.6 * steps + 0.02).all()
    assert (off[..., 1:] / steps.clamp(min=1e-6)[..., 1:]).mean() < 0.28


@pytest.mark.parametrize(("head_size", "num_clusters"), SHAPES)
def test_values_are_near(head_size, num_clusters):
    means, counts = example(head_size, num_clusters)
    packed, steps = short_means.encode_values(means, counts, torch.bfloat16)
    off = (short_means.decode_values(packed, steps, head_size) - means).abs()
    steps = steps.float()[..., None]
    assert (off <= 1.6 * steps).all() and (off / steps).mean() < 0.28


def test_all_halves_are_finite():
    every = torch.cartesian_prod(*[torch.arange(16)] * 4)  # of 16 bits, low first
    codes = torch.zeros(2**16 // 8, 16, 32, dtype=torch.int64)
    # Half h of a word of keys: dimensions 8 j + 2 p + h in nibble p.
    of_words = codes.view(-1, 16, 4, 4, 2).permute(0, 1, 2, 4, 3)
    of_words[:, 0] = every.view(-1, 4, 2, 4)
    packed = short_means.pack(codes, of_keys=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert packed.view(dtype).isfinite().all()
    stored = short_means.unpack(packed, 16, 32, of_keys=True)
    lower = codes - stored
    assert ((lower == 0) | (lower == 1)).all()
    assert lower.sum() == 2**16 // 32  # exponents of ones


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_the_size_of_means_does_not_matter(size, dtype):
    """Nor that some dimensions are a thousand times as large as others."""
    torch.manual_seed(0)
    means = size * torch.randn(3, 32, 64) * torch.logspace(-3, 0, 64)
    counts = torch.ones(3, 32)
    near = short_means.decode_keys(*short_means.encode_keys(means, counts, dtype))
    off = (near - means).abs()
    deviations = means.std(1, keepdim=True)
    if size * 1e-3 < torch.finfo(dtype).smallest_normal:  # fp16
        off, deviations = off[..., 32:], deviations[..., 32:]
    assert (off <= 0.9 * deviations).all()
    assert (off / deviations).mean() < 0.15
    packed, steps = short_means.encode_values(means, counts, dtype)
    off = (short_means.decode_values(packed, steps, 64) - means).abs()
    # A step is a 15th of the range.
    assert (off <= 1.6 / 7.5 * means.abs().amax(2, keepdim=True)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_means_stay_finite_bits(bad):
    """Whatever rows hold, codes are finite; a mean that is not says so in its step."""
    means, counts = example(64, 16)
    means[0, 0, 3, 5] = bad
    packed, steps = short_means.encode_values(means, counts, torch.bfloat16)
    assert packed.view(torch.float16).isfinite().all()
    assert not steps[0, 0, 3].isfinite()
    steps[0, 0, 3] = 0
    assert steps.isfinite().all()


def test_empty_clusters_do_not_count():
    means, counts = example(64, 16)
    wild = means.clone()
    wild[..., ::3, :] = 1e30
    counts[..., ::3] = 0
    of_keys = short_means.encode_keys(wild, counts, torch.bfloat16)
    assert (of_keys[1][..., ::3] == 0).all()
    near = (short_means.decode_keys(*of_keys) - means)[counts > 0]
    assert near.abs().max() < 60
    _, steps = short_means.encode_values(wild, counts, torch.bfloat16)
    assert (steps[..., ::3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1.0, 6e4])
def test_equal_means_stay(size, dtype):
    means = torch.full((1, 16, 32), size).to(dtype).float()
    counts = torch.ones(1, 16)
    coded = short_means.encode_keys(means, counts, dtype)
    # In fp32 a sum over its count may be off by a bit.
    torch.testing.assert_close(
        short_means.decode_keys(*coded), means, rtol=2e-7, atol=0
    )
