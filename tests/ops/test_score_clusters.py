# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""``score_clusters`` is the reference's products, in fp32 and to its last bits.

Its ``softmax_sums`` are those of the scores it wrote: max to the bit, sum to rounding.
"""

from math import exp, inf, nan

import pytest
import torch

from tests.support import cases
from tests.support.bad_arguments import (
    PAGES,
    QUERY,
    ROWS,
    SOFTMAX_SUMS,
    longer,
    per_cluster,
    rejected,
)
from tests.support.compare import assert_close, assert_same_bits
from tests.support.inputs import Pages, make_decode_inputs
from vllm_clusterkv import ops, reference, short_means
from vllm_clusterkv.page_layout import PageLayout

SMALL = cases.DecodeCase((257, 300), group=2)
SUM_TOLERANCE = 5e-6  # relative, of some hundred terms by fast exponentials


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_scores_match_the_reference(case, device):
    inputs = make_decode_inputs(case)
    on_device = inputs.to(device)
    actual, expected = on_device.score(ops), inputs.score(reference)
    assert_close(actual, expected, scores_by_einsum(inputs))
    assert_same_bits(on_device.pages.buffer, inputs.pages.buffer)


def scores_by_einsum(inputs):
    """Scores in fp32, of the decoded mean keys and summed in another order."""
    scores = inputs.score_args()["scores"]
    for req in range(len(inputs.seq_lens)):
        blocks = inputs.block_table[req, : inputs.num_indexed(req)].long()
        fields = inputs.pages.fields[blocks]
        base = fields.key_base.float()  # [pages, H, D]
        query = inputs.query[req].unflatten(0, (base.shape[1], -1))
        off = fields.mean_keys() - base[:, :, None]
        exact = fields.key_deviations[:, :, None].float() * query.float()
        rounded = reference.deviating_query(query, fields.key_deviations[:, :, None])
        deviating = torch.where(exact != 0, rounded / exact, 1) * query.float()
        of_mean = torch.einsum("phgd,phcd->hgpc", deviating, off)
        of_mean += torch.einsum("hgd,phd->hgp", query.float(), base)[..., None]
        squares = reference.query_squares(query)
        spread = reference.spread_score(squares, fields[:, :, None], inputs.scale)
        found = inputs.scale * of_mean + spread.permute(1, 2, 0, 3)
        scores[req, :, : inputs.num_live(req)] = found.flatten(2).flatten(0, 1)
    return scores


def test_a_row_does_not_depend_on_its_batch(device):
    inputs = make_decode_inputs(cases.DecodeCase((1500, 0, 257, 600))).to(device)
    together = inputs.score_all(ops)
    for again, before in zip(inputs.score_all(ops), together, strict=True):
        assert_same_bits(again, before)
    for req in range(4):
        alone = inputs.only(req).score_all(ops)
        for of_row, before in zip(alone, together, strict=True):
            assert_same_bits(of_row[0], before[req])


@pytest.mark.parametrize("num_clusters", [16, 32, 64])
@pytest.mark.parametrize("dtype", [cases.BF16, cases.FP16], ids=str)
def test_elements_are_read_exactly(num_clusters, dtype, device):
    """One-hot queries pick single elements of the means: x * 1 + 0 is x.

    With a step of zero these are the base's: every finite number of 16 bits, in bf16 up
    to 2^100 and down to its smallest normal number. Else they are codes.
    """
    every = torch.arange(-(2**15), 2**15).short().view(dtype)
    usable = every.isfinite() & (every.abs() < 2.0**100)
    if dtype == cases.BF16:
        usable &= (every.abs() >= torch.finfo(dtype).tiny) | (every == 0)
    layout = PageLayout(1, head_size=64, num_clusters=num_clusters, dtype=dtype)
    num_base = -(-int(usable.sum()) // 64)
    num_pages = num_base + 8
    pages = Pages.poisoned(layout, num_pages + 1)
    fields = pages.fields
    generator = torch.Generator().manual_seed(0)
    shape = (num_pages + 1, 1, num_clusters, 64)
    fields.key_codes[:] = short_means.pack(
        torch.randint(16, shape, generator=generator), of_keys=True
    )
    fields.cluster_ends[:] = torch.arange(1, num_clusters + 1) * (256 // num_clusters)
    fields.radii.zero_()
    fields.profile.zero_()
    fields.key_base.zero_()
    fields.key_base[:num_base].flatten()[: int(usable.sum())] = every[usable]
    of_base = torch.zeros(num_base * 64, dtype=dtype)
    of_base[: int(usable.sum())] = every[usable]
    fields.key_base[:num_base, 0] = of_base.view(-1, 64)
    fields.key_deviations[:] = 2.0 ** torch.randint(-3, 4, (64,), generator=generator)
    fields.key_steps[:] = 2.0 ** torch.randint(
        -3, 4, (num_clusters,), generator=generator
    )
    fields.key_steps[:num_base] = 0
    expected = fields.mean_keys()[:num_pages, 0].flatten(0, 1).T  # [64, clusters]
    pages = pages.to(device)
    scores = torch.empty(4, 16, (num_pages + 1) * num_clusters, device=device)
    ops.score_clusters(
        query=torch.eye(64, dtype=dtype, device=device).view(4, 16, 64),
        **pages.args(),
        block_table=torch.arange(num_pages + 1, device=device).int().repeat(4, 1),
        seq_lens=torch.full((4,), num_pages * 256 + 1, device=device).int(),
        min_sparse_lens=torch.zeros(4, dtype=torch.int32, device=device),
        scale=1.0,
        num_sink_tokens=0,
        scores=scores,
        softmax_sums=torch.empty(4, 16, 3, 2, device=device),
    )
    found = scores.flatten(0, 1).cpu()
    assert torch.equal(found[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_infinities_and_nans_reach_the_scores(dtype, device):
    inputs = make_decode_inputs(cases.DecodeCase((257,), dtype, num_kv_heads=1))
    block = inputs.block_table[0, 0]
    steps = inputs.pages.fields.key_steps[block, 0]
    steps[:3] = torch.tensor([inf, -inf, nan])
    expected = inputs.score(reference)[0, 0]
    assert expected[:2].isinf().all()
    found = inputs.to(device).score(ops)[0, 0].cpu()
    assert found[:2].tolist() == expected[:2].tolist()
    assert found[2].isnan()
    num_clusters = inputs.pages.layout.num_clusters
    assert found[3:num_clusters].isfinite().all()


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -3e38])
def test_a_wild_query_stays_in_its_row_and_head(wild, device):
    inputs = make_decode_inputs(cases.DecodeCase((600, 0, 700)))
    expected = inputs.to(device).score_all(ops)
    inputs.query[0, 5, 7] = wild
    actual = inputs.to(device).score_all(ops)
    for is_, should_be in zip(actual, expected, strict=True):
        is_[0, 5] = should_be[0, 5]
        assert_same_bits(is_, should_be)
    if wild != wild:
        scores = inputs.to(device).score(ops)[0, 5]
        assert scores[: inputs.num_live(0)].isnan().all()


@pytest.mark.parametrize("size", [1.0, 300.0, 60000.0])
def test_products_beyond_fp16(size, device):
    """Queries whose products with deviations fp16 has no room for."""
    inputs = make_decode_inputs(cases.DecodeCase((900, 600), cases.FP16, group=2))
    inputs.query[:] = size * inputs.query.sign()
    inputs.scale = 0.1 / size
    for req in range(2):
        blocks = inputs.block_table[req, : inputs.num_indexed(req)].long()
        fields = inputs.pages.fields
        fields.key_deviations[blocks] *= 300
        fields.key_steps[blocks] /= 300
        fields.radii[blocks] = 0
    actual, expected = inputs.to(device).score(ops), inputs.score(reference)
    assert_close(actual, expected, scores_by_einsum(inputs))


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_softmax_sums_are_those_of_the_scores(case, device):
    inputs = make_decode_inputs(case)
    scores, actual = inputs.to(device).score_all(ops)
    assert_sums(actual, inputs.softmax_sums(scores.cpu()))


@pytest.mark.parametrize("num_parts", [1, 2, 4, 5, 6, 40, 1000])
def test_softmax_sums_of_any_number_of_parts(num_parts, device):
    inputs = make_decode_inputs(
        cases.DecodeCase(
            (1500, 1281, 0, 300, 700),
            group=5,
            num_parts=num_parts,
            min_sparse_lens=(0, 0, 0, 0, 701),
        )
    )
    before = inputs.to(device).score(ops)
    scores, actual = inputs.to(device).score_all(ops)
    assert_same_bits(scores, before)
    assert_sums(actual, inputs.softmax_sums(scores.cpu()))


def assert_sums(actual, expected):
    """NaN is what the op must not write."""
    actual = actual.cpu()
    assert_same_bits(actual[..., 0], expected[..., 0])
    torch.testing.assert_close(
        actual[..., 1], expected[..., 1], rtol=SUM_TOLERANCE, atol=0, equal_nan=True
    )


def one_hot_inputs(num_pages, tokens_per_cluster, num_sink_tokens, logits, num_parts=3):
    """One row and head, whose cluster ``c`` has the score ``logits[c]``: no spread."""
    case = cases.DecodeCase(
        (num_pages * 256 + 1,),
        num_kv_heads=1,
        group=1,
        tokens_per_cluster=tokens_per_cluster,
        num_sink_tokens=num_sink_tokens,
        num_parts=num_parts,
    )
    inputs = make_decode_inputs(case)
    inputs.scale = 1.0
    inputs.query.zero_()
    inputs.query[..., 0] = 1
    blocks = inputs.block_table[0, :num_pages].long()
    fields = inputs.pages.fields
    num_clusters = fields.num_clusters
    codes = torch.full((num_pages, 1, num_clusters, 64), 8)  # half a step
    fields.key_codes[blocks] = short_means.pack(codes, of_keys=True)
    steps = 2 * torch.tensor(logits).view(num_pages, 1, -1)
    fields.key_steps[blocks] = steps.to(cases.BF16)
    one_hot = torch.zeros(64, dtype=cases.BF16)
    one_hot[0] = 1
    fields.key_deviations[blocks] = one_hot
    fields.key_base[blocks] = fields.profile[blocks] = 0
    fields.radii[blocks] = 0
    return inputs, blocks


@pytest.mark.parametrize("tokens_per_cluster", [4, 8, 16])
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
    inputs.pages.fields.profile[blocks] = profile.bfloat16()
    inputs.pages.fields.radii[blocks] = radii.bfloat16()
    scores = inputs.to(device).score(ops)
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
    without.pages.fields.radii.zero_()
    live = expected.isfinite()
    added = (expected - without.score(reference))[live]
    assert 0.01 < added.median() < 3.9
    actual = inputs.to(device).score(ops)
    assert_close(actual, expected, scores_by_einsum(inputs))


def test_a_warp_of_many_pages(device):
    """Many rows and heads in so few parts that a GPU's warps score page after page."""
    inputs = make_decode_inputs(
        cases.DecodeCase((1281, 257, 1025) * 24, num_kv_heads=8, group=1, num_parts=2)
    )
    actual = inputs.to(device).score(ops)
    assert_close(actual, inputs.score(reference), scores_by_einsum(inputs))


OF_FIRST_PAGE = 112 + 128 * exp(-1)


@pytest.mark.parametrize(
    ("num_parts", "expected"),
    [
        (1, [[2, OF_FIRST_PAGE * exp(-1) + 256 * exp(-5) + 256]]),
        (2, [[2, OF_FIRST_PAGE * exp(-1) + 256], [-3, 256]]),
        (3, [[1, OF_FIRST_PAGE], [-3, 256], [2, 256]]),
        (4, [[1, OF_FIRST_PAGE], [-3, 256], [2, 256], [nan, nan]]),
    ],
)
def test_softmax_sums_by_hand(num_parts, expected, device):
    """Sinks, empty clusters with the best scores."""
    logits = [1.0, 9, *[1] * 6, *[0] * 8, *[-3] * 16, *[2] * 16]
    inputs, blocks = one_hot_inputs(3, 16, 16, logits, num_parts)
    ends = torch.arange(16, 257, 16).repeat(3, 1)
    ends[0, :2] = torch.tensor([32, 32])  # cluster 1 is empty
    inputs.pages.cluster_ends[blocks, 0] = ends.short()
    _, sums = inputs.to(device).score_all(ops)
    torch.testing.assert_close(sums[0, 0].cpu(), torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize(
    ("num_parts", "expected"),
    [
        (1, [[5, 256]]),
        (2, [[-inf, 0], [5, 256]]),
        (3, [[-inf, 0], [5, 256], [-inf, 0]]),
    ],
)
def test_a_part_without_tokens(num_parts, expected, device):
    """Of pages without clustered tokens: in front of others, and behind them."""
    inputs, blocks = one_hot_inputs(3, 8, 16, [5.0] * 96, num_parts)
    ends = torch.arange(8, 257, 8).repeat(3, 1)
    ends[0], ends[2] = 16, 0
    inputs.pages.cluster_ends[blocks, 0] = ends.short()
    _, sums = inputs.to(device).score_all(ops)
    assert sums[0, 0].tolist() == expected


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e30])
def test_softmax_sums_of_any_spread(scale, device):
    inputs = make_decode_inputs(cases.DecodeCase((1500, 600), group=3))
    inputs.scale = scale
    scores, actual = inputs.to(device).score_all(ops)
    assert actual[:, :, :2].isfinite().all()
    assert_sums(actual, inputs.softmax_sums(scores.cpu()))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        *PAGES,
        *ROWS,
        *QUERY,
        *per_cluster("scores", "Float"),
        *SOFTMAX_SUMS,
        ("scores", longer(1), r"scores.size\(1\) must equal its number of heads"),
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
