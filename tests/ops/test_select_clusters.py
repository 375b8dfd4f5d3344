# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""``select_clusters`` takes the heaviest clusters, and no more than the budget asks."""

import pytest
import torch

from tests.support import cases
from tests.support.bad_arguments import (
    PAGES,
    ROWS,
    SOFTMAX_SUMS,
    doubled,
    flattened,
    longer,
    padded,
    per_cluster,
    rejected,
)
from tests.support.compare import assert_same_bits
from tests.support.inputs import UNTOUCHED, make_decode_inputs
from vllm_clusterkv import ops, reference

SMALL = cases.DecodeCase((257, 300), group=2)
NEAR_TIE = 1e-5  # relative; kernels may compute exp and the sums as they like


# More clusters than a CUDA block has registers for, and nearly as many.
LONG = [
    cases.DecodeCase(
        (150_000,), num_kv_heads=1, group=16, tokens_per_cluster=4, token_budget=1024
    ),
    cases.DecodeCase(
        (60_000, 20_000),
        num_kv_heads=1,
        group=5,
        tokens_per_cluster=4,
        token_budget=999,
    ),
    # As many as 1,024 threads hold, and as 512 do.
    cases.DecodeCase((32_768,), tokens_per_cluster=4, token_budget=1024),
    cases.DecodeCase(
        (32_768, 20_000, *[0] * 38), num_kv_heads=1, group=1, tokens_per_cluster=4
    ),
]


@pytest.mark.parametrize("case", cases.ALL + LONG, ids=str)
def test_selection_matches_the_reference(case, device):
    inputs = make_decode_inputs(case)
    scores = inputs.score(reference)
    expected, _ = inputs.select(reference, scores, case.token_budget)
    selected, num_attended = inputs.to(device).select(ops, scores, case.token_budget)
    selected, num_attended = selected.cpu(), num_attended.cpu()
    for req, head, weights, sizes in rows_and_heads(inputs, scores):
        actual, wanted = selected[req, head], expected[req, head]
        assert_fewest_heaviest(actual, weights, sizes, case.token_budget)
        differing = weights[actual[: len(sizes)] != wanted[: len(sizes)]]
        if len(differing):
            assert differing.max() - differing.min() <= NEAR_TIE * differing.max()
        assert (actual[len(sizes) :] == UNTOUCHED).all()
        always = inputs.seq_lens[req] - sizes.sum()
        taken = (actual[: len(sizes)] * sizes).sum()
        assert num_attended[req, head] == always + taken


def rows_and_heads(inputs, scores):
    """Yields (row, KV head, fp64 weights of its clusters, their sizes)."""
    for req in range(len(inputs.seq_lens)):
        blocks = inputs.block_table[req, : inputs.num_indexed(req)]
        for head in range(inputs.pages.layout.num_kv_heads):
            group = scores.shape[1] // inputs.pages.layout.num_kv_heads
            sizes = reference.cluster_sizes(
                inputs.pages.cluster_ends[blocks, head], inputs.num_sink_tokens
            )
            rows = scores[req, head * group : (head + 1) * group, : len(sizes)]
            yield req, head, reference.rank_weights(rows.double(), sizes), sizes


def assert_fewest_heaviest(selected, weights, sizes, token_budget):
    """The rule of the op's docstring, on the result alone."""
    chosen = selected[: len(sizes)].bool()
    if sizes.sum() <= token_budget:
        assert chosen.all()
        return
    assert not (chosen & (sizes == 0)).any()
    last = weights[chosen].min()
    assert weights[~chosen].max() <= last * (1 + NEAR_TIE)
    taken = sizes[chosen].sum()
    lightest = sizes[chosen & (weights <= last * (1 + NEAR_TIE))].max()
    assert taken - lightest < token_budget <= taken


@pytest.mark.parametrize("num_parts", [1, 2, 5, 6, 40, 1000])
def test_any_number_of_parts_gives_the_same_selection(num_parts, device):
    inputs = make_decode_inputs(
        cases.DecodeCase((1500, 300), group=3, num_parts=num_parts)
    )
    scores = inputs.score(reference)
    expected = inputs.select(reference, scores, 100)
    actual = inputs.to(device).select(ops, scores, 100)
    for is_, should_be in zip(actual, expected, strict=True):
        assert_same_bits(is_, should_be)


def equal_pages(num_pages, **options):
    """Pages of 16 clusters of 16 tokens, no sinks, scores all zero."""
    case = cases.DecodeCase(
        (num_pages * 256 + 1,),
        num_kv_heads=1,
        num_sink_tokens=0,
        tokens_per_cluster=16,
        **options,
    )
    inputs = make_decode_inputs(case)
    inputs.pages.cluster_ends[inputs.block_table[0, :num_pages]] = torch.arange(
        16, 257, 16
    ).short()
    return inputs, torch.zeros_like(inputs.score_args()["scores"])


@pytest.mark.parametrize(
    ("token_budget", "num_clusters"),
    [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (600, 38), (767, 48), (768, 48)],
)
def test_ties_go_to_the_lowest_index(token_budget, num_clusters, device):
    inputs, scores = equal_pages(3)
    selected, num_attended = inputs.to(device).select(ops, scores, token_budget)
    wanted = (torch.arange(48) < num_clusters).byte()
    assert torch.equal(selected[0, 0, :48].cpu(), wanted)
    assert num_attended.item() == 1 + 16 * num_clusters


def test_ties_among_clusters_that_underflow(device):
    """A weight that fp32 cannot hold is zero, and zeros tie like any others."""
    inputs, scores = equal_pages(3)
    scores[..., 20:] = -1000
    scores[..., 40] = 1000
    selected, _ = inputs.to(device).select(ops, scores, 16 * 5)
    assert selected[0, 0, :48].nonzero().flatten().tolist() == [0, 1, 2, 3, 40]


def test_empty_clusters_are_passed_over(device):
    """The best scores belong to empty clusters, which must not sway the softmax."""
    inputs, scores = equal_pages(1)
    ends = torch.full((16,), 256, dtype=torch.int16)
    ends[:4] = torch.tensor([0, 100, 100, 200])
    inputs.pages.cluster_ends[inputs.block_table[0, 0], 0] = ends
    scores[..., :16] = torch.arange(16.0)
    scores[..., [0, 2]] = 1e30
    scores[..., 4] = -1e30
    selected, num_attended = inputs.to(device).select(ops, scores, 120)
    assert selected[0, 0, :16].nonzero().flatten().tolist() == [1, 3]
    assert num_attended.item() == 1 + 200


def test_query_heads_vote_with_normalised_weights(device):
    """One head's large logits do not outvote two heads that agree."""
    inputs, scores = equal_pages(1, group=3)
    scores[0, 0, 5] = 50
    scores[0, 1:, 7] = 10
    selected, _ = inputs.to(device).select(ops, scores, 16)
    assert selected[0, 0, :16].nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4, 1e30])
def test_scores_of_any_spread(spread, device):
    case = cases.DecodeCase((1500,), group=4)
    inputs = make_decode_inputs(case)
    scores = inputs.score(reference)
    scores *= spread
    expected = inputs.select(reference, scores, 100)
    actual = inputs.to(device).select(ops, scores, 100)
    weights = next(rows_and_heads(inputs, scores))[2]
    heavy = weights > 1e-30
    assert torch.equal(
        actual[0][0, 0, : len(heavy)].cpu()[heavy],
        expected[0][0, 0, : len(heavy)][heavy],
    )


def test_nan_scores_select_something_within_bounds(device):
    inputs = make_decode_inputs(cases.DecodeCase((700, 1300)))
    scores = inputs.score(reference)
    scores[0, 0, 3] = scores[1, :, ::2] = float("nan")
    selected, _ = inputs.to(device).select(ops, scores, 100)
    for req in range(2):
        live = inputs.num_live(req)
        assert selected[req, :, :live].max() <= 1
        assert (selected[req, :, live:] == UNTOUCHED).all()


def test_dense_rows_attend_to_everything_and_select_nothing(device):
    inputs = make_decode_inputs(
        cases.DecodeCase((700, 700, 0, 513), min_sparse_lens=(701, 700, 1, 2**30))
    )
    scores = inputs.score(reference)
    assert (scores[[0, 2, 3]] == float("inf")).all()
    selected, num_attended = inputs.to(device).select(ops, scores, 100)
    assert num_attended[:, 0].tolist()[::2] == [700, 0]
    assert num_attended[3].tolist() == [513, 513]
    assert (num_attended[1] < 700).all()
    assert (selected[[0, 2, 3]] == UNTOUCHED).all()


def test_a_row_does_not_depend_on_its_batch(device):
    inputs = make_decode_inputs(cases.DecodeCase((1500, 0, 257, 600))).to(device)
    scores, sums = inputs.score_all(ops)
    selected, num_attended = inputs.select(ops, scores, 100, sums)
    for req in range(4):
        row = slice(req, req + 1)
        alone = inputs.only(req).select(ops, scores[row], 100, sums[row])
        assert_same_bits(alone[0][0], selected[req])
        assert_same_bits(alone[1][0], num_attended[req])


def test_a_larger_budget_only_adds_clusters(device):
    inputs = make_decode_inputs(cases.DecodeCase((1500,))).to(device)
    scores, sums = inputs.score_all(ops)
    before = torch.zeros_like(scores[:, :2], dtype=torch.uint8)
    for token_budget in (1, 16, 17, 100, 500, 1263, 1264, 2000):
        selected, _ = inputs.select(ops, scores, token_budget, sums)
        assert (selected >= before).all()
        before = selected


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        *PAGES,
        *ROWS,
        *per_cluster("scores", "Float"),
        *per_cluster("selected", "Byte"),
        *SOFTMAX_SUMS,
        ("scores", longer(1), r"a multiple of num_kv_heads \(2\), got 5"),
        ("selected", longer(1), r"selected.size\(1\) must equal its number of heads"),
        ("num_attended", flattened, r"num_attended must have 2 dimensions, got 1"),
        ("num_attended", doubled, r"num_attended must have dtype Int, got Long"),
        ("num_attended", longer(0), r"num_attended.size\(0\) must equal num_reqs"),
        ("num_attended", longer(1), r"num_attended.size\(1\) must equal num_kv_heads"),
        ("num_attended", padded, r"num_attended must be contiguous"),
        ("num_sink_tokens", lambda _: -1, r"must be 0 to block_size - 1 .* got -1"),
        ("num_sink_tokens", lambda _: 256, r"0 to block_size - 1 \(255\), got 256"),
        ("token_budget", lambda _: 0, r"token_budget must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(name, spoil, message):
    inputs = make_decode_inputs(SMALL)
    args = inputs.select_args(inputs.score(reference), 100)
    rejected(ops.select_clusters, args, name, spoil, message)


def test_opcheck(device):
    inputs = make_decode_inputs(SMALL).to(device)
    args = inputs.select_args(inputs.score(ops), 100)
    torch.library.opcheck(
        torch.ops.clusterkv.select_clusters.default, tuple(args.values())
    )
