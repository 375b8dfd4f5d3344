# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The references agree with dense attention where they must, and with hand counts."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import cases
from tests.support.baselines import dense_attention
from tests.support.batched_reference import BatchedReference, cluster_keys
from tests.support.inputs import Pages, make_decode_inputs
from tests.support.means import check_means
from tests.support.random_cases import draw_case, make_random_inputs
from vllm_clusterkv import reference
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout

CLOSE = {"rtol": 2e-5, "atol": 1e-5}


def attend(inputs, token_budget, tail_estimate=True):
    scores, _ = inputs.score_all(reference)
    selected, num_attended = inputs.select(reference, scores, token_budget)
    output = inputs.decode(reference, scores, selected, tail_estimate=tail_estimate)
    return output, num_attended


def index_all(inputs):
    """Indexes every complete page of every row, as decoding would have."""
    for req in range(len(inputs.seq_lens)):
        blocks = inputs.block_table[req, : inputs.num_indexed(req)]
        sinks = torch.zeros(len(blocks), dtype=torch.int32)
        sinks[:1] = inputs.num_sink_tokens
        reference.index_pages(
            **inputs.pages.args(),
            block_ids=blocks,
            num_sink_tokens=sinks,
            num_iters=2,
        )


@pytest.mark.parametrize("tail_estimate", [True, False])
@pytest.mark.parametrize("num_sink_tokens", [0, 16])
@pytest.mark.parametrize("tokens_per_cluster", [4, 8, 16])
def test_a_covering_budget_is_dense(tokens_per_cluster, num_sink_tokens, tail_estimate):
    inputs = make_decode_inputs(
        cases.DecodeCase(
            (0, 1, 255, 256, 257, 513, 900),
            cases.FP32,
            tokens_per_cluster=tokens_per_cluster,
            num_sink_tokens=num_sink_tokens,
        )
    )
    expected = dense_attention(inputs)
    index_all(inputs)
    output, num_attended = attend(inputs, 900, tail_estimate)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(dense_attention(inputs), expected, **CLOSE)
    assert torch.equal(num_attended, inputs.seq_lens[:, None].expand(-1, 2))


def test_dense_rows_need_no_index():
    inputs = make_decode_inputs(
        cases.DecodeCase((700, 256, 1, 0), cases.FP32, min_sparse_lens=(701,) * 4)
    )
    assert (inputs.pages.index == 255).all()
    output, num_attended = attend(inputs, token_budget=1)
    torch.testing.assert_close(output, dense_attention(inputs), **CLOSE)
    assert torch.equal(num_attended, inputs.seq_lens[:, None].expand(-1, 2))


def test_the_tail_estimate_is_exact_for_clusters_of_equal_rows():
    """n equal rows are one row with log(n) on its logit; a budget of 1 will do."""
    inputs = make_decode_inputs(cases.DecodeCase((900, 300), cases.FP32))
    for req in range(2):
        for i, block in enumerate(inputs.block_table[req, : inputs.num_indexed(req)]):
            sinks = 16 if i == 0 else 0
            kinds = torch.arange(BLOCK_SIZE - sinks) * 16 // (BLOCK_SIZE - sinks)
            inputs.pages.kv_cache[block, :, sinks:] = rows_of_exact_means()[kinds]
    index_all(inputs)
    expected = dense_attention(inputs)
    output, num_attended = attend(inputs, token_budget=1)
    assert (num_attended < inputs.seq_lens[:, None] - 200).all()
    torch.testing.assert_close(output, expected, **CLOSE)
    output, _ = attend(inputs, token_budget=1, tail_estimate=False)
    assert (output - expected).abs().max() > 0.1


def rows_of_exact_means():
    """16 rows that means of 4 bits have exactly: [16, 128] fp32.

    Each dimension has one magnitude, and as many rows of either sign, so that keys are
    a deviation above or below the base: the outermost codes, 0 and 15. Two of 15 would
    share 16 bits that must stay finite, so neighbours in a word differ.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(16, 128, generator=generator).argsort(0)
    signs = torch.where(order < 8, -1.0, 1.0)
    for dim in range(0, 64, 8):
        signs[:, dim + 6 : dim + 8] = -signs[:, dim + 4 : dim + 6]
    for dim in range(64, 128, 32):
        signs[:, dim + 24 : dim + 32] = -signs[:, dim + 16 : dim + 24]
    sizes = torch.ones(128)
    sizes[:64] = 0.25 + torch.rand(64, generator=generator)
    return signs * sizes


def test_the_tail_estimate_comes_closer_to_dense():
    inputs = make_decode_inputs(cases.DecodeCase((1500,), cases.FP32))
    expected = dense_attention(inputs)
    errors = [
        (attend(inputs, token_budget, tail_estimate)[0] - expected).norm()
        for token_budget in (100, 500)
        for tail_estimate in (False, True)
    ]
    assert errors[1] < errors[0] / 2 and errors[3] < errors[2] / 2


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_an_indexed_page_holds_its_rows_and_their_means(dtype):
    layout = PageLayout(2, 64, 16, dtype)
    pages = Pages.poisoned(layout, 1)
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, BLOCK_SIZE, 128, generator=generator).to(dtype)
    pages.kv_cache[0] = before
    reference.index_pages(
        **pages.args(),
        block_ids=torch.tensor([0]),
        num_sink_tokens=torch.tensor([16]),
        num_iters=3,
    )
    for head in range(2):
        rows, ends = pages.kv_cache[0, head], pages.cluster_ends[0, head].tolist()
        assert torch.equal(rows[:16], before[head, :16])
        moved = (before[head][:, None] == rows).all(-1)  # [before, after]
        assert (moved.sum(0) == 1).all() and (moved.sum(1) == 1).all()
        counts = torch.tensor(ends).diff(prepend=torch.tensor([16]))
        labels = torch.arange(16).repeat_interleave(counts)
        members = F.one_hot(labels, 16).T.float()
        check_means(
            pages.fields[:, head : head + 1],
            members[None, None],
            rows[None, None, 16:].float(),
        )


@pytest.mark.parametrize("seed", range(12))
def test_the_batched_references_agree(seed):
    """Those of tests/support, for the random cases."""
    case = draw_case(seed, "cpu")
    inputs, block_ids, num_sink_tokens = make_random_inputs(case, seed, "cpu")
    reference.index_pages(
        **inputs.pages.args(),
        block_ids=block_ids,
        num_sink_tokens=num_sink_tokens,
        num_iters=1,
    )
    batch = BatchedReference(inputs)
    live = batch.live[:, None]
    scores, _ = inputs.score_all(reference)
    actual, bound = batch.scores()
    assert (((actual - scores).abs() <= bound) | ~live).all()
    selected, _ = inputs.select(reference, scores, case.token_budget)
    chosen = batch.select(batch.rank_weights(scores), case.token_budget)
    assert torch.equal(chosen & live, (selected == 1) & live)
    options = {"tail_estimate": case.tail_estimate, "out_dtype": torch.float32}
    expected = inputs.decode(reference, scores, selected, **options)
    output, magnitude = batch.decode(scores, selected, case.tail_estimate)
    assert ((output - expected).abs() <= 1e-5 * magnitude).all()


@pytest.mark.parametrize("num_iters", [1, 2, 8])
def test_batched_clustering_agrees(num_iters):
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(3, 16, 64, generator=generator)
    labels = torch.randint(16, (3, 240), generator=generator)
    keys = topics.gather(1, labels[..., None].expand(-1, -1, 64))
    keys += 0.1 * torch.randn(3, 240, 64, generator=generator)
    expected = [reference.cluster_keys(page, 16, num_iters) for page in keys]
    assert torch.equal(cluster_keys(keys, 16, num_iters), torch.stack(expected))


def test_keys_join_the_nearest_direction():
    """Sixteen orthogonal directions, lengths from 1 to 100: clusters in the order in
    which directions come, since ties go to the lowest row."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(16, (256,), generator=generator)
    labels[torch.arange(16) ** 2] = torch.arange(16)
    labels = labels.where(labels <= torch.arange(256).sqrt(), 0)
    lengths = 1 + 99 * torch.rand(256, 1, generator=generator)
    keys = lengths * torch.eye(64)[labels]
    assert torch.equal(reference.cluster_keys(keys, 16, num_iters=8), labels)


def test_clusters_start_at_keys_far_from_each_other():
    directions = F.normalize(
        torch.tensor([[0.0, 1], [0, 0], [1, 9], [-1, -5], [1, 1], [0, 3]]), dim=1
    )
    keys = directions * torch.tensor([1.0, 1, 2, 3, 4, 5])[:, None]
    # From up: down, the diagonal, and the nearer of the neighbours.
    assert reference.spread_rows(keys, 4).tolist() == [0, 3, 4, 2]
    assert reference.spread_rows(keys[:2], 4).tolist() == [0, 0, 0, 0]
    assert reference.spread_rows(keys[1:3], 4).tolist() == [0, 1, 1, 1]


def test_more_rounds_make_tighter_clusters():
    keys = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))

    def tightness(num_iters):
        members = F.one_hot(reference.cluster_keys(keys, 16, num_iters), 16).float()
        nearest = (members @ members.T @ keys) / (members @ members.sum(0))[:, None]
        return torch.cosine_similarity(keys, nearest).mean()

    assert tightness(8) > tightness(2) > tightness(1)


def test_first_argmax_takes_the_lowest_of_equals():
    similarity = torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0], [-1, -2, -1, 5]])
    assert reference.first_argmax(similarity).tolist() == [1, 0, 3]


def test_cluster_sizes_count_from_the_sinks_in_the_first_page_only():
    ends = torch.tensor([[20, 20, 256], [0, 100, 256]], dtype=torch.int16)
    sizes = reference.cluster_sizes(ends, num_sink_tokens=16)
    assert sizes.tolist() == [4, 0, 236, 0, 100, 156]
    assert reference.cluster_sizes(ends[:0], num_sink_tokens=16).tolist() == []


def test_weights_are_a_softmax_a_token():
    scores = torch.tensor([[0.0, 1, 9, 2], [3, 0, 9, 0]])
    counts = torch.tensor([5, 1, 0, 10])
    weights = reference.rank_weights(scores, counts)
    tokens = scores.repeat_interleave(counts, 1).softmax(1).sum(0)
    assert torch.allclose(weights[[0, 1, 3]], tokens[[0, 5, 6]])
    assert weights[2] == -1
    torch.testing.assert_close((weights * counts).sum(), torch.tensor(2.0))
