# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Codes of keys: every bit has one owner, and what goes in comes out."""

import pytest
import torch

from tests.support.cases import BF16, DTYPES, FP16, FP32
from vllm_clusterkv import key_codes, reference
from vllm_clusterkv.page_layout import NUM_STEPS, PageLayout, num_coded_dims

NUM_CLUSTERS = [8, 16, 32]


def page(num_clusters, dtype, head_size=64, num_rows=256, seed=0):
    """Keys, labels with every third cluster empty, means and spread as stored."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_rows, head_size, generator=generator)
    keys *= torch.linspace(2, 0.1, head_size)[
        torch.randperm(head_size, generator=generator)
    ]
    keys = keys.to(dtype).float()
    labels = torch.rand(num_rows, generator=generator) ** 2 * num_clusters
    labels = labels.long()
    labels = torch.where(labels % 3 == 2, labels - 1, labels)
    return keys, labels, *describe(keys, labels, num_clusters, dtype)


def describe(keys, labels, num_clusters, dtype):
    """Means and spread: [num_clusters, head_size] and [head_size + num_clusters]."""
    members = torch.nn.functional.one_hot(labels, num_clusters).T.float()
    means = members @ keys / members.sum(1, keepdim=True).clamp(min=1)
    spread = reference.key_spread(keys, labels, num_clusters)
    return means.to(dtype), spread.to(dtype)


def rounded_roots(profile, dims):
    """Deviations as stored, in fp32."""
    return profile[dims].double().sqrt().float().to(profile.dtype).float()


def levels(keys, labels, means, spread):
    """Of each row -3, -1, 1 or 3 in each coded dimension, by the docstring."""
    head_size = keys.shape[1]
    dims = key_codes.coded_dims(spread[:head_size].float())
    deviations = rounded_roots(spread[:head_size], dims)
    steps = 2 * key_codes.STEP * deviations * spread[head_size:].float()[labels, None]
    off = keys[:, dims] - means.float()[labels][:, dims]
    outer = torch.where(off.abs() >= steps, 3, 1)
    outer = torch.where((off < 0) & (off == -steps), 1, outer)  # a step reached is left
    return torch.where(off >= 0, outer, -outer).float()


@pytest.mark.parametrize("num_dims", [16, 32, 64])
@pytest.mark.parametrize("num_clusters", NUM_CLUSTERS)
def test_every_bit_has_one_owner(num_clusters, num_dims):
    byte, shift = key_codes.place(num_clusters, num_dims)
    num_keys = key_codes.num_coded_keys(num_clusters)
    assert byte.shape == shift.shape == (num_clusters, num_keys, num_dims)
    assert (shift % 2 == 0).all() and shift.min() == 0 and shift.max() == 6
    pairs = (4 * byte + shift // 2).flatten().sort().values
    assert torch.equal(pairs, torch.arange(4 * 4 * NUM_STEPS * num_dims))


@pytest.mark.parametrize("num_dims", [16, 32, 64])
@pytest.mark.parametrize("num_clusters", NUM_CLUSTERS)
def test_a_lane_has_its_columns_and_dimensions(num_clusters, num_dims):
    """A quarter of the dimensions, of the columns ``g`` and ``g + 8``."""
    byte, _ = key_codes.place(num_clusters, num_dims)
    lane = byte // 16 % 32
    cluster = torch.arange(num_clusters)[:, None, None].expand(byte.shape)
    quarter = (torch.arange(num_dims) // (num_dims // 4)).expand(byte.shape)
    assert torch.equal(lane % 4, quarter)
    assert torch.equal(lane // 4, cluster % 8)


@pytest.mark.parametrize(
    ("head_size", "num_dims"),
    [(16, 16), (64, 16), (80, 32), (128, 32), (160, 64), (256, 64)],
)
def test_a_quarter_of_the_dimensions_is_coded(head_size, num_dims):
    assert num_coded_dims(head_size) == num_dims


def test_the_dimensions_of_the_largest_profile():
    profile = torch.ones(2, 64)
    profile[0, [60, 3, 17]] = torch.tensor([5.0, 4, 9])
    profile[0, 5] = 0.5
    dims = key_codes.coded_dims(profile)
    assert dims[0].tolist() == [*range(5), *range(6, 15), 17, 60]
    assert dims[1].tolist() == list(range(16))


def assert_codes(signed, expected, cluster, num_clusters):
    """Equal, but of 16 bits that would not be a finite number one code is lower."""
    byte, shift = key_codes.place(num_clusters, signed.shape[-1])
    may_be_lower = (byte % 2 == 1) & (shift == 6)  # the upper two of 16 bits
    difference = expected - signed
    assert torch.isin(difference, torch.tensor([0.0, 2])).all()
    assert (difference[~may_be_lower[cluster]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("make", ["drawn", "extreme"])
def test_all_bytes_are_finite_numbers(make, head_size, dtype):
    """Rows will lie there one day, and FlashAttention reads them all."""
    keys, labels, means, spread = page(16, dtype, head_size)
    if make == "extreme":  # codes of 3 but for few, dimensions up to the last
        means = means - 100
        spread[:head_size] = torch.arange(head_size) + 1
    codes = key_codes.encode(keys, labels, means, spread)
    assert codes.view(dtype).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_clusters", NUM_CLUSTERS)
def test_few_codes_are_lower_for_that(num_clusters, dtype):
    keys, labels, means, spread = page(num_clusters, dtype, 128)
    codes = key_codes.encode(keys, labels, means, spread)
    signed = key_codes.decode(codes, num_clusters, 128, dtype)[2]
    expected = levels(keys, labels, means, spread)
    of_all = 0
    for c in range(num_clusters):
        rows = expected[labels == c]
        order = (rows.abs() == 3).sum(1).argsort(descending=True, stable=True)
        if len(rows):
            again = torch.arange(signed.shape[1]) % min(len(rows), signed.shape[1])
            of_all += int((signed[c] != rows[order[again]]).sum())
    assert 0 < of_all < 0.02 * signed.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [64, 96, 256])
@pytest.mark.parametrize("num_clusters", NUM_CLUSTERS)
def test_codes_come_out_as_they_went_in(num_clusters, head_size, dtype):
    keys, labels, means, spread = page(num_clusters, dtype, head_size)
    codes = key_codes.encode(keys, labels, means, spread)
    layout = PageLayout(1, head_size, num_clusters, dtype)
    assert codes.shape == (layout.code_bytes,) and codes.dtype == torch.uint8
    dims, deviations, signed = key_codes.decode(codes, num_clusters, head_size, dtype)
    profile = spread[:head_size].float()
    assert torch.equal(dims, key_codes.coded_dims(profile))
    assert torch.equal(deviations, rounded_roots(spread[:head_size], dims))
    expected = levels(keys, labels, means, spread)
    num_keys = key_codes.num_coded_keys(num_clusters)
    for c in range(num_clusters):
        rows = expected[labels == c]
        if len(rows) == 0:
            assert (signed[c] == -3).all()  # zero bits
            continue
        order = (rows.abs() == 3).sum(1).argsort(descending=True, stable=True)
        kept = rows[order[torch.arange(num_keys) % min(len(rows), num_keys)]]
        assert_codes(signed[c], kept, c, num_clusters)


def test_batches_decode_as_one_by_one():
    pages = [
        key_codes.encode(*page(16, BF16, seed=seed)).view(1, -1) for seed in range(3)
    ]
    together = key_codes.decode(torch.stack(pages), 16, 64, BF16)
    for i, alone in enumerate(pages):
        for actual, expected in zip(
            together, key_codes.decode(alone, 16, 64, BF16), strict=True
        ):
            assert torch.equal(actual[i], expected)


def test_the_farthest_keys_of_a_large_cluster_are_kept():
    """200 keys near the mean, and 16 at different places that are far off it."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(256, 64, generator=generator) * 0.1
    far = torch.randperm(216, generator=generator)[:16]
    keys[far] = 3 * torch.randn(16, 64, generator=generator).sign()
    labels = torch.zeros(256, dtype=torch.int64)
    labels[216:] = 1 + torch.arange(40) % 15
    means, spread = describe(keys, labels, 16, FP32)
    spread[:64] = 1
    signed = key_codes.decode(
        key_codes.encode(keys, labels, means, spread), 16, 64, FP32
    )[2]
    wanted = 3 * keys[far.sort().values, :16].sign()
    assert_codes(signed[0], wanted, 0, 16)  # ties: in the order of the rows


def test_a_small_cluster_has_its_keys_again():
    keys, _, *_ = page(16, FP32)
    labels = torch.arange(256) % 15 + 1
    labels[:3] = 0
    means, spread = describe(keys, labels, 16, FP32)
    codes = key_codes.encode(keys, labels, means, spread)
    signed = key_codes.decode(codes, 16, 64, FP32)[2]
    three = levels(keys, labels, means, spread)[:3]
    three = three[(three.abs() == 3).sum(1).argsort(descending=True, stable=True)]
    assert_codes(signed[0], three[torch.arange(16) % 3], 0, 16)


def test_codes_tell_where_a_key_is():
    """Products with queries come near those of the coded part of keys."""
    keys, labels, means, spread = page(16, FP16)
    codes = key_codes.encode(keys, labels, means, spread)
    dims, deviations, signed = key_codes.decode(codes, 16, 64, FP16)
    steps = key_codes.STEP * deviations * spread[64:].float()[labels, None]
    coded = levels(keys, labels, means, spread) * steps
    off = (keys - means.float()[labels])[:, dims]
    assert (coded - off).norm() < 0.5 * off.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite(bad):
    """Codes are bytes of the right number; those of no profile are of the first."""
    keys, labels, *_ = page(16, BF16)
    keys[7, 3] = bad
    means, spread = describe(keys, labels, 16, BF16)
    codes = key_codes.encode(keys, labels, means, spread)
    dims, deviations, signed = key_codes.decode(codes, 16, 64, BF16)
    assert dims.tolist() == list(range(16)) and (deviations == 0).all()
    assert torch.isin(signed, torch.tensor([-3.0, -1, 1, 3])).all()


def test_the_best_key_by_hand():
    """A cluster of two keys at -1 and 1 in one dimension: levels of -3 and 3."""
    codes = torch.zeros(PageLayout(1, 16, 16, FP32).code_bytes, dtype=torch.uint8)
    codes[: 16 * 4].view(FP32)[:] = torch.tensor([2.0, 0.5, *[0.0] * 14])
    codes[16 * 4 : 16 * 6].view(torch.int16)[:] = torch.arange(16)
    byte, shift = key_codes.place(16, 16)
    for key, (first, second) in enumerate([(3, 1), (2, 3)] * 8):
        for dim, code in enumerate((first, second)):
            codes[16 * 6 + byte[5, key, dim]] |= code << int(shift[5, key, dim])
    query = torch.zeros(3, 16)
    query[:, :2] = torch.tensor([[1.0, 0], [0, 8], [-1, -4]])
    radii = torch.full((16,), 0.25)
    radii[6] = 0
    decoded = key_codes.decode(codes, 16, 16, FP32)
    best = key_codes.best_key(query, decoded, radii)
    assert best.shape == (3, 16)
    # Levels of cluster 5: (3, -1) and (1, 3); weights: (2, 0), (0, 4), (-2, -2).
    found = best[:, 5] / (key_codes.STEP * 0.25)
    torch.testing.assert_close(found, torch.tensor([6.0, 12, -4]))
    # Zero codes: levels of -3.
    torch.testing.assert_close(
        best[:, 4] / (key_codes.STEP * 0.25), torch.tensor([-6.0, -12, 12])
    )
    assert (best[:, 6] == 0).all()


def test_weights_are_rounded_to_fp16_and_cut():
    codes = torch.zeros(PageLayout(1, 16, 16, FP32).code_bytes, dtype=torch.uint8)
    codes[: 16 * 4].view(FP32)[0] = 1
    codes[16 * 4 : 16 * 6].view(torch.int16)[:] = torch.arange(16)
    query = torch.zeros(4, 16)
    query[:, 0] = torch.tensor([-1e6, -1 - 2.0**-11, -1 - 2.0**-10, 2.0**-26])
    decoded = key_codes.decode(codes, 16, 16, FP32)
    best = key_codes.best_key(query, decoded, torch.ones(16))[:, 0] / key_codes.STEP
    expected = torch.tensor([3 * 65504.0, 3, 3 * (1 + 2.0**-10), 0])
    torch.testing.assert_close(best, expected, rtol=1e-6, atol=0)
