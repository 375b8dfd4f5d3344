# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Codes of keys: ``index_pages`` writes the reference's to the bit, and by them
``score_clusters`` finds keys that their clusters' means hide."""

from math import log, sqrt

import pytest
import torch

from tests.ops.test_index_pages import (
    indexed_heads,
    place,
    random_rows,
    run,
    separable_rows,
)
from tests.ops.test_score_clusters import scores_by_einsum
from tests.support import cases
from tests.support.bad_arguments import rejected
from tests.support.cases import IndexCase
from tests.support.compare import assert_close, assert_same_bits
from tests.support.inputs import make_decode_inputs
from vllm_clusterkv import key_codes, ops, reference
from vllm_clusterkv.page_layout import BLOCK_SIZE


def uneven_rows(case, seed=0):
    """Keys of some large dimensions and many small ones, in clusters of any size."""
    rows = random_rows(case, seed).float()
    generator = torch.Generator().manual_seed(seed + 1)
    sizes = torch.linspace(-3, 1, case.head_size).exp()
    sizes = sizes[torch.randperm(case.head_size, generator=generator)]
    topics = 4 * torch.randn(5, case.head_size, generator=generator)
    topic = (torch.rand(rows.shape[:3], generator=generator) ** 3 * 5).long()
    rows[..., : case.head_size] += topics[topic]
    rows[..., : case.head_size] *= sizes
    return rows.to(case.dtype)


def codes_of_stored(case, pages, blocks):
    """Yields (stored codes, codes by the reference) of each page and head."""
    for page, head, sinks, rows, labels, _ in indexed_heads(case, pages, blocks):
        block = blocks[page]
        expected = key_codes.encode(
            rows[sinks:, : case.head_size].float(),
            labels,
            pages.centroids[block, head, 0],
            pages.spreads[block, head],
        )
        yield pages.codes[block, head], expected


@pytest.mark.parametrize("make_rows", [random_rows, separable_rows, uneven_rows])
@pytest.mark.parametrize("case", cases.INDEX, ids=str)
def test_codes_are_the_references(case, make_rows, device):
    """Given the means and spreads that are stored; these may differ in rounding."""
    pages, blocks = run(case, make_rows(case), device)
    for actual, expected in codes_of_stored(case, pages, blocks):
        assert_same_bits(actual, expected)


def test_equal_keys_have_no_deviations(device):
    """All are at their mean: every difference reaches a step of zero."""
    case = IndexCase((0,), num_kv_heads=1)
    rows = random_rows(case)
    rows[..., : case.head_size] = 1.5
    pages, blocks = run(case, rows, device)
    for actual, expected in codes_of_stored(case, pages, blocks):
        assert_same_bits(actual, expected)
        _, deviations, signed = key_codes.decode(actual, 16, case.head_size, case.dtype)
        assert (deviations == 0).all()
        assert sorted(signed.mean((1, 2)).tolist()) == [-3.0] * 15 + [3.0]


@pytest.mark.parametrize("make_rows", [random_rows, uneven_rows])
@pytest.mark.parametrize("case", cases.INDEX, ids=str)
def test_indexes_are_finite_numbers(case, make_rows, device):
    """With a host tier they lie where rows will be, and FlashAttention reads them."""
    pages, blocks = run(case, make_rows(case), device)
    layout = pages.layout
    used = slice(layout.kv_bytes, layout.used_bytes)
    indexes = pages.bytes_of_blocks()[blocks.long(), used].contiguous()
    assert indexes.view(case.dtype).isfinite().all()


@pytest.mark.parametrize("num_clusters", [8, 16, 32])
def test_a_cluster_without_keys_has_zero_codes(num_clusters, device):
    case = IndexCase((250,), tokens_per_cluster=256 // num_clusters, num_kv_heads=1)
    pages, blocks = run(case, random_rows(case), device)
    ends = pages.cluster_ends[blocks[0], 0]
    is_empty = torch.diff(ends, prepend=torch.tensor([250])) == 0
    assert is_empty.sum() >= num_clusters - 6
    codes = pages.codes[blocks[0], 0]
    signed = key_codes.decode(codes, num_clusters, case.head_size, case.dtype)[2]
    assert (signed[is_empty] == -3).all()
    assert (signed[~is_empty] != -3).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_keys_that_are_not_finite_spoil_their_page_and_head_only(bad, device):
    case = IndexCase((16, 0), num_kv_heads=2)
    rows = random_rows(case)
    clean, blocks = run(case, rows, device)
    rows[0, 1, 100, 3] = bad
    pages, _ = run(case, rows, device)
    is_other = torch.ones(2, 2, dtype=torch.bool)
    is_other[0, 1] = False
    assert_same_bits(pages.codes[blocks][is_other], clean.codes[blocks][is_other])
    codes = pages.codes[blocks[0], 1]
    dims, _, _ = key_codes.decode(codes, 16, case.head_size, case.dtype)
    assert (dims < case.head_size).all()


def planted(dtype, device):
    """Two pages of keys around 16 directions, and a query for one key among them.

    Keys scatter in a quarter of the dimensions, which has no part in the directions and
    all of the query. The key for which that asks has another beside it that is as far
    off on the other side, so that their cluster's mean says nothing of them. Keys of
    another direction all agree with the query, but less.

    Returns:
        The inputs, indexed by the op, and the key's cluster.
    """
    case = cases.DecodeCase((513,), dtype, 128, 1, group=2, num_sink_tokens=0)
    inputs = make_decode_inputs(case)
    generator = torch.Generator().manual_seed(0)
    is_asked = torch.arange(128) % 4 == 1
    asked = torch.randn(128, generator=generator).sign() * is_asked
    centres = torch.zeros(16, 128)
    centres[:, ~is_asked] = 12 * torch.eye(96)[:16]
    centres[7] += 0.5 * asked
    direction = torch.arange(256) % 16
    blocks = inputs.block_table[0, :2].contiguous()
    for block in blocks:
        noise = torch.randn(256, 128, generator=generator)
        keys = centres[direction] + noise * torch.where(is_asked, 1, 0.1)
        inputs.pages.kv_cache[block, 0, :, :128] = keys.to(dtype)
    rows = inputs.pages.kv_cache[blocks[1], 0]
    rows[3 + 16 * 5, :128] = (centres[3] - 2 * asked).to(dtype)
    rows[3 + 16 * 9, :128] = (centres[3] + 2 * asked).to(dtype)
    rows[3 + 16 * 9, 128:] = 99
    query = 4 * asked + 0.1 * torch.randn(2, 128, generator=generator)
    inputs.query[0] = query.to(dtype)
    on_device = inputs.to(device)
    ops.index_pages(
        **on_device.pages.coded_args(),
        block_ids=blocks.to(device),
        num_sink_tokens=torch.zeros_like(blocks).to(device),
        num_iters=4,
    )
    inputs.pages = on_device.pages.to("cpu")
    row = (inputs.pages.kv_cache[blocks[1], 0, :, 128] == 99).nonzero().int()
    ends = inputs.pages.cluster_ends[blocks[1], 0].int()
    return inputs, 16 + int(torch.searchsorted(ends, row, right=True))


@pytest.mark.parametrize("dtype", [cases.BF16, cases.FP16], ids=str)
def test_a_planted_key_is_found(dtype, device):
    """Its cluster is ranked first, which by what stands in for it it is not."""
    inputs, cluster = planted(dtype, device)
    scores, estimates, _ = inputs.to(device).score_all(ops)
    assert scores[0, :, :32].argmax(1).tolist() == [cluster] * 2
    assert (estimates[0, :, :32].argmax(1) != cluster).all()
    selected, _ = inputs.to(device).select(ops, scores, token_budget=16)
    assert selected[0, 0, cluster] == 1
    selected, _ = inputs.to(device).select(ops, estimates, token_budget=16)
    assert selected[0, 0, cluster] == 0
    codes = inputs.pages.codes.clone()
    inputs.pages.codes.zero_()
    by_spread = inputs.to(device).score(ops)[0, :, :32]
    assert (by_spread.argmax(1) != cluster).all()
    inputs.pages.codes.copy_(codes)
    expected = inputs.score_all(reference)[:2]
    for each in zip(
        (scores, estimates), expected, scores_by_einsum(inputs), strict=True
    ):
        assert_close(*each)


def by_hand(num_clusters, dtype):
    """One page and head; mean keys of 2 in dimension 0, a profile of 4 in dimension 8.

    Coded keys of cluster ``c``: their last has 3 in dimension 8, the others -1.
    """
    case = cases.DecodeCase(
        (257,),
        dtype,
        num_kv_heads=1,
        group=1,
        tokens_per_cluster=256 // num_clusters,
        num_sink_tokens=0,
    )
    inputs = make_decode_inputs(case)
    inputs.scale = 0.5
    inputs.query.zero_()
    inputs.query[..., 0], inputs.query[..., 8] = 1, 16
    block, pages = inputs.block_table[0, 0], inputs.pages
    pages.centroids[block] = 0
    pages.centroids[block, :, 0, :, 0] = 2
    profile = torch.zeros(64)
    profile[8] = 4
    radii = torch.arange(num_clusters) / 4
    pages.spreads[block, 0] = torch.cat([profile, radii]).to(dtype)
    ends = torch.arange(1, num_clusters + 1) * (256 // num_clusters)
    ends[3] = ends[2]  # cluster 3 is empty, cluster 4 has twice as many tokens
    pages.cluster_ends[block, 0] = ends.short()
    size = dtype.itemsize
    codes = torch.zeros_like(pages.codes[block, 0])
    codes[: 16 * size].view(dtype)[8] = 2
    codes[16 * size : 16 * (size + 2)].view(torch.int16)[:] = torch.arange(16)
    byte, shift = (where[..., 8] for where in key_codes.place(num_clusters, 16))
    numbers = torch.ones_like(byte)
    numbers[:, -1] = 3
    numbers <<= shift
    steps = torch.zeros(64 * 16, dtype=torch.int64)
    steps.index_put_((byte,), numbers, accumulate=True)
    codes[16 * (size + 2) :] = steps.byte()
    pages.codes[block, 0] = codes
    return inputs, radii, torch.diff(ends, prepend=torch.tensor([0]))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("num_clusters", [8, 16, 32])
def test_scores_by_hand(num_clusters, dtype, device):
    inputs, radii, counts = by_hand(num_clusters, dtype)
    scores, estimates, _ = inputs.to(device).score_all(ops)
    scores, estimates = scores.cpu(), estimates.cpu()
    for c in range(num_clusters):
        radius = float(radii[c])
        # The logit of the mean is 1; the query asks for 16 in the dimension.
        variance = (0.5 * radius) ** 2 * 16**2 * 4
        score = 1 + min(0.75 * (sqrt(1 + variance) - 1), 4)
        if counts[c]:
            best = 0.5 * 16 * 2 * radius * key_codes.STEP * 3
            score = max(score, 1 + best - log(counts[c]))
        assert scores[0, 0, c] == pytest.approx(score, rel=1e-5)
        assert estimates[0, 0, c] == pytest.approx(min(score, 5), rel=1e-5)
    assert (scores[0, 0, 4:num_clusters] > 5).any()


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("case", cases.REGULAR + cases.IRREGULAR, ids=str)
def test_estimates_are_held_near_their_means(case, spread, device):
    """At most 4 above the mean's logit, and no more than scores, which often are."""
    inputs = make_decode_inputs(case)
    inputs.scale *= spread
    scores, estimates, _ = inputs.to(device).score_all(ops)
    for pages_field in (inputs.pages.spreads, inputs.pages.codes):
        pages_field[inputs.block_table.unique().long()] = 0
    of_means = inputs.to(device).score(ops)
    live = of_means.isfinite()
    assert_same_bits(scores.isfinite(), live)
    room = 4 + 2e-6 * of_means[live].abs().max()
    assert (estimates[live] <= of_means[live] + room).all()
    assert (estimates[live] <= scores[live]).all()
    assert (estimates[live] >= of_means[live] - room + 4).all()
    if spread > 1:
        assert (scores[live] > of_means[live] + room).float().mean() > 0.1
    held = scores[live] <= of_means[live] + 3.9
    assert_same_bits(estimates[live][held], scores[live][held])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("tokens_per_cluster", [8, 16, 32])
def test_codes_that_are_not_numbers_leave_scores_by_spread(
    tokens_per_cluster, dtype, device
):
    """Deviations of NaN give what no codes give."""
    case = cases.DecodeCase((1100, 600), dtype, tokens_per_cluster=tokens_per_cluster)
    inputs = make_decode_inputs(case)
    blocks = inputs.block_table[inputs.block_table >= 0].unique().long()
    without = make_decode_inputs(case)
    without.pages.codes[blocks] = 0
    inputs.pages.codes[blocks, :, : 16 * dtype.itemsize] = 255
    actual = inputs.to(device).score_all(ops)
    expected = without.to(device).score_all(ops)
    assert not actual[0].isnan().any()
    for is_, should_be in zip(actual, expected, strict=True):
        assert_same_bits(is_, should_be)


@pytest.mark.parametrize("end", [-1, 0, 30000])
def test_clusters_that_cannot_be_have_no_best_key(end, device):
    """Ends of an index that is not valid: poison, zeros, garbage."""
    case = cases.DecodeCase((600,), num_sink_tokens=16)
    inputs, without = make_decode_inputs(case), make_decode_inputs(case)
    blocks = inputs.block_table[0, :2].long()
    for each in (inputs, without):
        each.pages.cluster_ends[blocks] = end
    without.pages.codes[blocks] = 0
    is_first = torch.zeros(2, 16, dtype=torch.bool)
    is_first[:, 0] = end > 0  # the only cluster that may have tokens
    kept = ~is_first.flatten()
    actual = inputs.to(device).score_all(ops)[:2]
    expected = without.to(device).score_all(ops)[:2]
    for is_, should_be in zip(actual, expected, strict=True):
        assert_same_bits(is_[0, :, :32][:, kept], should_be[0, :, :32][:, kept])


def test_a_nan_mean_is_a_nan_score(device):
    inputs = make_decode_inputs(cases.DecodeCase((257,), num_kv_heads=1))
    block = inputs.block_table[0, 0]
    inputs.pages.centroids[block, 0, 0, 5, 7] = float("nan")
    for found in inputs.to(device).score_all(ops)[:2]:
        is_nan = found[0, :, :16].isnan()
        assert is_nan[:, 5].all() and is_nan.sum() == len(is_nan)


@pytest.mark.parametrize("magnitude", [1e-4, 1e2, 1e4])
def test_weights_at_the_ends_of_fp16(magnitude, device):
    """Some are subnormal, or cut: as the reference rounds them."""
    case = cases.DecodeCase((900, 600), group=3, head_size=128)
    inputs = make_decode_inputs(case)
    inputs.query *= magnitude
    inputs.scale /= magnitude
    dims, deviations, _ = key_codes.decode(
        inputs.pages.codes[inputs.block_table[0, 0]], 16, 128, case.dtype
    )
    weights = inputs.query[0, :3, dims[0]].float() * deviations[0]
    if magnitude > 1:
        inputs.query *= 10  # beyond 65504
    else:
        assert (weights.abs() < 2.0**-14).any()
    expected = inputs.score_all(reference)[:2]
    actual = inputs.to(device).score_all(ops)[:2]
    for each in zip(actual, expected, scores_by_einsum(inputs), strict=True):
        assert_close(*each)


def test_codes_lie_where_the_index_table_says(device):
    """Codes of other pages give other scores; apart from the index, none."""
    inputs = make_decode_inputs(cases.DecodeCase((900, 700), group=2))
    inputs.scale *= 10
    spilled = inputs.spilled()
    expected = inputs.to(device).score(ops)
    assert_same_bits(spilled.to(device).score(ops), expected)
    spilled.pages.codes[inputs.block_table[0, 0]] = 0
    assert not torch.equal(spilled.to(device).score(ops)[0], expected[0])
    message = r"codes must lie as many bytes apart from block to block as centroids"
    args = inputs.spilled().score_args()
    rejected(ops.score_clusters, args, "codes", lambda t: t.clone(), message)


@pytest.mark.parametrize("head_size", [8, 288])
def test_head_sizes_without_codes_are_refused(head_size):
    case = IndexCase((0,), head_size=head_size, num_kv_heads=1)
    rows = torch.zeros(1, 1, BLOCK_SIZE, 2 * head_size, dtype=case.dtype)
    pages, block_ids, num_sink_tokens = place(case, rows)
    with pytest.raises(RuntimeError, match=r"must be 16 to 256, got"):
        ops.index_pages(
            **pages.coded_args(),
            block_ids=block_ids,
            num_sink_tokens=num_sink_tokens,
            num_iters=1,
        )
