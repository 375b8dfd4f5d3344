# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""``score_clusters`` is the reference's products, in fp32 and to its last bits.

Its ``tile_stats`` are those of the scores it wrote: max to the bit, sum to rounding.
``test_codes.py`` has what codes of keys add to scores.
"""

from math import exp

import pytest
import torch

from tests.support import cases
from tests.support.bad_arguments import (
    CODES,
    PAGES,
    QUERY,
    ROWS,
    TILE_STATS,
    longer,
    per_cluster,
    rejected,
)
from tests.support.compare import assert_close, assert_same_bits
from tests.support.inputs import Pages, make_decode_inputs
from vllm_clusterkv import key_codes, ops, reference
from vllm_clusterkv.page_layout import PageLayout

SMALL = cases.DecodeCase((257, 300), group=2)
SUM_TOLERANCE = 5e-6  # relative, of 16 terms by fast exponentials


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_scores_match_the_reference(case, device):
    inputs = make_decode_inputs(case)
    on_device = inputs.to(device)
    actual, expected = on_device.score_all(ops)[:2], inputs.score_all(reference)[:2]
    for each in zip(actual, expected, scores_by_einsum(inputs), strict=True):
        assert_close(*each)
    assert_same_bits(on_device.pages.buffer, inputs.pages.buffer)


def scores_by_einsum(inputs):
    """Scores and estimates in fp32, summed in PyTorch's order."""
    args = inputs.score_args()
    layout = inputs.pages.layout
    for req in range(len(inputs.seq_lens)):
        blocks = inputs.block_table[req, : inputs.num_indexed(req)].long()
        means = inputs.pages.centroids[blocks, :, 0].float()
        query = inputs.query[req].float().unflatten(0, (means.shape[1], -1))
        of_mean = inputs.scale * torch.einsum("hgd,phcd->hgpc", query, means)
        spreads = inputs.pages.spreads[blocks].float().unflatten(1, (-1, 1))
        squares = reference.query_squares(inputs.query[req]).view_as(query)
        spread = reference.spread_score(squares, spreads, inputs.scale)
        by_spread = of_mean + spread.permute(1, 2, 0, 3)  # from [pages, H, G, C]
        dims, deviations, signed = key_codes.decode(
            inputs.pages.codes[blocks],
            layout.num_clusters,
            layout.head_size,
            inputs.query.dtype,
        )
        asked = query[None].expand(len(blocks), -1, -1, -1)
        asked = asked.gather(3, dims[:, :, None].expand(-1, -1, query.shape[1], -1))
        weights = (asked * deviations[:, :, None]).clamp(-65504, 65504).half().float()
        products = torch.einsum("phgi,phcki->hgpck", weights, (signed + 3) / 2)
        best = 2 * products.amax(4) - 3 * weights.sum(3).permute(1, 2, 0)[..., None]
        radii = inputs.scale * spreads[..., 0, layout.head_size :].transpose(0, 1)
        best *= key_codes.STEP * radii[:, None]
        counts = [
            reference.cluster_sizes(ends, inputs.num_sink_tokens)
            for ends in inputs.pages.cluster_ends[blocks].unbind(1)
        ]
        counts = torch.stack(counts).view(len(counts), 1, *of_mean.shape[2:])
        scores = reference.best_score(by_spread, of_mean, best, counts)
        estimates = scores.minimum(of_mean + reference.SPREAD_MOST)
        for name, found in (("scores", scores), ("estimates", estimates)):
            flat = found.flatten(2).flatten(0, 1)
            args[name][req, :, : inputs.num_live(req)] = flat
    return args["scores"], args["estimates"]


def test_a_row_does_not_depend_on_its_batch(device):
    inputs = make_decode_inputs(cases.DecodeCase((1500, 0, 257, 600))).to(device)
    together = inputs.score_all(ops)
    for again, before in zip(inputs.score_all(ops), together, strict=True):
        assert_same_bits(again, before)
    for req in range(4):
        alone = inputs.only(req).score_all(ops)
        for of_row, before in zip(alone, together, strict=True):
            assert_same_bits(of_row[0], before[req])


@pytest.mark.parametrize("dtype", [cases.BF16, cases.FP16], ids=str)
def test_every_finite_16_bit_value_is_read_exactly(dtype, device):
    """One-hot queries pick single elements of the means: x * 1 + 0 is x.

    bf16 is tried up to 2^100 and down to its smallest normal number.
    """
    every = torch.arange(-(2**15), 2**15).short().view(dtype)
    usable = every.isfinite() & (every.abs() < 2.0**100)
    if dtype == cases.BF16:
        usable &= (every.abs() >= torch.finfo(dtype).tiny) | (every == 0)
    layout = PageLayout(num_kv_heads=1, head_size=64, num_clusters=16, dtype=dtype)
    num_pages = 64
    means = torch.zeros(num_pages * 16 * 64, dtype=dtype)
    means[: int(usable.sum())] = every[usable]
    means = means.view(num_pages, 1, 16, 64)
    pages = Pages.poisoned(layout, num_pages + 1)
    pages.centroids[:num_pages, :, 0] = means
    pages.spreads.zero_()
    pages.codes.zero_()
    pages = pages.to(device)
    pages.cluster_ends[:] = torch.arange(16, 257, 16, device=device).short()
    scores = torch.empty(4, 16, (num_pages + 1) * 16, device=device)
    estimates = torch.empty_like(scores)
    ops.score_clusters(
        query=torch.eye(64, dtype=dtype, device=device).view(4, 16, 64),
        **pages.coded_args(),
        block_table=torch.arange(num_pages + 1, device=device).int().repeat(4, 1),
        seq_lens=torch.full((4,), num_pages * 256 + 1, device=device).int(),
        min_sparse_lens=torch.zeros(4, dtype=torch.int32, device=device),
        scale=1.0,
        num_sink_tokens=0,
        scores=scores,
        estimates=estimates,
        tile_stats=torch.empty(4, 16, num_pages + 1, 2, device=device),
    )
    expected = means.float().view(-1, 64).T
    for found in (scores, estimates):
        found = found.flatten(0, 1).cpu()
        assert torch.equal(found[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_infinities_and_nans_reach_the_scores(dtype, device):
    inf, nan = float("inf"), float("nan")
    inputs = make_decode_inputs(cases.DecodeCase((257,), dtype, num_kv_heads=1))
    inputs.query.fill_(1)
    block = inputs.block_table[0, 0]
    inputs.pages.centroids[block, 0, 0, :4, :2] = torch.tensor(
        [[inf, 1], [-inf, 1], [nan, 1], [inf, -inf]], dtype=dtype
    )
    for found in inputs.to(device).score_all(ops)[:2]:
        found = found[0, 0].cpu()
        assert found[:2].tolist() == [inf, -inf]
        assert found[2:4].isnan().all()
        assert found[4:16].isfinite().all()


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_tile_stats_are_those_of_the_scores(case, device):
    inputs = make_decode_inputs(case)
    scores, _, actual = inputs.to(device).score_all(ops)
    assert_stats(actual, inputs.tile_stats(scores.cpu()))


def assert_stats(actual, expected):
    """NaN is what the op must not write."""
    actual = actual.cpu()
    assert_same_bits(actual[..., 0], expected[..., 0])
    torch.testing.assert_close(
        actual[..., 1], expected[..., 1], rtol=SUM_TOLERANCE, atol=0, equal_nan=True
    )


def one_hot_inputs(num_pages, tokens_per_cluster, num_sink_tokens, logits):
    """One row and head, whose cluster ``c`` has the score ``logits[c]``: no spread, and
    no key that is not its cluster's mean."""
    case = cases.DecodeCase(
        (num_pages * 256 + 1,),
        num_kv_heads=1,
        group=1,
        tokens_per_cluster=tokens_per_cluster,
        num_sink_tokens=num_sink_tokens,
    )
    inputs = make_decode_inputs(case)
    inputs.scale = 1.0
    inputs.query.zero_()
    inputs.query[..., 0] = 1
    blocks = inputs.block_table[0, :num_pages].long()
    means = inputs.pages.centroids[blocks, 0, 0]  # [num_pages, num_clusters, D]
    means[:] = 0
    means[..., 0] = torch.tensor(logits, dtype=means.dtype).view(num_pages, -1)
    inputs.pages.centroids[blocks, 0, 0] = means
    inputs.pages.spreads[blocks] = inputs.pages.codes[blocks] = 0
    return inputs, blocks


@pytest.mark.parametrize("tokens_per_cluster", [8, 16, 32])
def test_spreads_by_hand(tokens_per_cluster, device):
    """By page and cluster; from none to the most that there may be."""
    inputs, blocks = one_hot_inputs(
        3, tokens_per_cluster, 0, [2.0] * (3 * 256 // tokens_per_cluster)
    )
    num_clusters = 256 // tokens_per_cluster
    inputs.query[..., 1] = -2
    profile = torch.zeros(3, 1, 64)
    profile[:, 0, :2] = torch.tensor([[3, 0.25], [0, 2], [8, 8]])
    radii = torch.arange(num_clusters).float().expand(3, 1, -1) / 2
    inputs.pages.spreads[blocks] = torch.cat([profile, radii], 2).bfloat16()
    scores, estimates, _ = inputs.to(device).score_all(ops)
    assert_same_bits(estimates, scores)
    scores = scores[0, 0, : 3 * num_clusters].view(3, -1)
    variances = torch.tensor([[4.0], [8], [40]]) * radii[0] ** 2
    added = (0.75 * ((1 + variances).sqrt() - 1)).clamp(max=4)
    assert (added == 4).any() and (added[:, 0] == 0).all()
    torch.testing.assert_close(scores.cpu(), 2 + added)


@pytest.mark.parametrize("size", [300.0, 5000.0, 20000.0])
def test_squares_beyond_fp16(size, device):
    """Queries whose squares fp16 has no room for, at spreads below the bound of 4."""
    inputs = make_decode_inputs(cases.DecodeCase((900, 600), cases.FP16, group=2))
    inputs.query[:] = size * inputs.query.sign()
    inputs.scale = 0.3 / size
    expected = inputs.score(reference)
    without = make_decode_inputs(cases.DecodeCase((900, 600), cases.FP16, group=2))
    without.query, without.scale = inputs.query, inputs.scale
    without.pages.spreads.zero_()
    live = expected.isfinite()
    added = (expected - without.score(reference))[live]
    assert 0.01 < added.median() < 3.9
    actual = inputs.to(device).score(ops)
    assert_close(actual, expected, scores_by_einsum(inputs)[0])


def test_a_warp_of_many_tiles(device):
    """So many rows and heads that a GPU's warps score tile after tile."""
    inputs = make_decode_inputs(
        cases.DecodeCase((1281, 257, 1025) * 24, num_kv_heads=8, group=1)
    )
    actual = inputs.to(device).score(ops)
    assert_close(actual, inputs.score(reference), scores_by_einsum(inputs)[0])


def test_tile_stats_by_hand(device):
    """Sinks, empty clusters with the best scores, a tile of two pages, half a tile."""
    inputs, blocks = one_hot_inputs(3, 32, 16, [1.0, 9, *[1] * 6, *[0] * 8, *[-3] * 8])
    ends = torch.arange(32, 257, 32).repeat(3, 1)
    ends[0, 1] = 32  # cluster 1 is empty, cluster 2 has 64 tokens
    inputs.pages.cluster_ends[blocks, 0] = ends.short()
    *_, stats = inputs.to(device).score_all(ops)
    assert stats.shape == (1, 1, 3, 2)
    torch.testing.assert_close(
        stats[0, 0, 0].cpu(), torch.tensor([1, 240 + 256 * exp(-1)])
    )
    assert stats[0, 0, 1].tolist() == [-3, 256]
    assert stats[0, 0, 2].isnan().all()


def test_a_tile_without_tokens(device):
    """In front of the tokens, where sinks end exactly there, and behind them."""
    inputs, blocks = one_hot_inputs(2, 8, 16, [5.0] * 64)
    ends = torch.full((2, 32), 256)
    ends[0, :16] = 16  # its first tile holds nothing behind the sinks
    ends[1, :16] = torch.arange(16, 257, 16)
    inputs.pages.cluster_ends[blocks, 0] = ends.short()
    *_, stats = inputs.to(device).score_all(ops)
    inf = float("inf")
    assert stats[0, 0, :4].tolist() == [[-inf, 0], [5, 240], [5, 256], [-inf, 0]]
    assert stats[0, 0, 4:].isnan().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e30])
def test_tile_stats_of_any_spread(scale, device):
    inputs = make_decode_inputs(cases.DecodeCase((1500, 600), group=3))
    inputs.scale = scale
    scores, _, actual = inputs.to(device).score_all(ops)
    assert actual[:, :, :2].isfinite().all()
    assert_stats(actual, inputs.tile_stats(scores.cpu()))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        *PAGES,
        *CODES,
        *ROWS,
        *QUERY,
        *per_cluster("scores", "Float"),
        *per_cluster("estimates", "Float"),
        *TILE_STATS,
        ("scores", longer(1), r"scores.size\(1\) must equal its number of heads"),
        ("estimates", longer(1), r"estimates.size\(1\) must equal its number of heads"),
        ("num_sink_tokens", lambda _: -1, r"must be 0 to block_size - 1 .* got -1"),
        ("num_sink_tokens", lambda _: 256, r"0 to block_size - 1 \(255\), got 256"),
    ],
)
def test_bad_arguments_are_named(name, spoil, message):
    args = make_decode_inputs(SMALL).score_args()
    rejected(ops.score_clusters, args, name, spoil, message)


def test_opcheck(device):
    args = make_decode_inputs(SMALL).to(device).score_args()
    torch.library.opcheck(
        torch.ops.clusterkv.score_clusters.default, tuple(args.values())
    )
