# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""``score_clusters`` is the reference's product, in fp32 and to its last bits."""

import pytest
import torch

from tests.support import cases
from tests.support.bad_arguments import (
    PAGES,
    QUERY,
    ROWS,
    longer,
    per_cluster,
    rejected,
)
from tests.support.compare import assert_close, assert_same_bits
from tests.support.inputs import Pages, make_decode_inputs
from vllm_clusterkv import ops, reference
from vllm_clusterkv.page_layout import PageLayout

SMALL = cases.DecodeCase((257, 300), group=2)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_scores_match_the_reference(case, device):
    inputs = make_decode_inputs(case)
    on_device = inputs.to(device)
    expected, actual = inputs.score(reference), on_device.score(ops)
    assert_close(actual, expected, scores_by_einsum(inputs))
    assert_same_bits(on_device.pages.buffer, inputs.pages.buffer)


def scores_by_einsum(inputs):
    """The scores in fp32, summed in PyTorch's order."""
    scores = inputs.score_args()["scores"]
    for req in range(len(scores)):
        blocks = inputs.block_table[req, : inputs.num_indexed(req)]
        means = inputs.pages.centroids[blocks, :, 0].float()
        query = inputs.query[req].float().unflatten(0, (means.shape[1], -1))
        row = torch.einsum("hgd,phcd->hgpc", query, means).flatten(2).flatten(0, 1)
        scores[req, :, : inputs.num_live(req)] = inputs.scale * row
    return scores


def test_a_row_does_not_depend_on_its_batch(device):
    inputs = make_decode_inputs(cases.DecodeCase((1500, 0, 257, 600))).to(device)
    together = inputs.score(ops)
    assert_same_bits(inputs.score(ops), together)
    for req in range(4):
        assert_same_bits(inputs.only(req).score(ops)[0], together[req])


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
    pages = pages.to(device)
    scores = torch.empty(4, 16, (num_pages + 1) * 16, device=device)
    ops.score_clusters(
        query=torch.eye(64, dtype=dtype, device=device).view(4, 16, 64),
        **pages.args(),
        block_table=torch.arange(num_pages + 1, device=device).int().repeat(4, 1),
        seq_lens=torch.full((4,), num_pages * 256 + 1, device=device).int(),
        min_sparse_lens=torch.zeros(4, dtype=torch.int32, device=device),
        scale=1.0,
        scores=scores,
    )
    expected = means.float().view(-1, 64).T
    scores = scores.flatten(0, 1).cpu()
    assert torch.equal(scores[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_infinities_and_nans_reach_the_scores(dtype, device):
    inf, nan = float("inf"), float("nan")
    inputs = make_decode_inputs(cases.DecodeCase((257,), dtype, num_kv_heads=1))
    inputs.query.fill_(1)
    block = inputs.block_table[0, 0]
    inputs.pages.centroids[block, 0, 0, :4, :2] = torch.tensor(
        [[inf, 1], [-inf, 1], [nan, 1], [inf, -inf]], dtype=dtype
    )
    scores = inputs.to(device).score(ops)[0, 0].cpu()
    assert scores[:2].tolist() == [inf, -inf]
    assert scores[2:4].isnan().all()
    assert scores[4:16].isfinite().all()


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        *PAGES,
        *ROWS,
        *QUERY,
        *per_cluster("scores", "Float"),
        ("scores", longer(1), r"scores.size\(1\) must equal its number of heads"),
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
