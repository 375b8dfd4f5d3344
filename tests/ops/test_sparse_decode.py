# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""``sparse_decode`` is one softmax over exact rows and means, however split."""

import pytest
import torch

from tests.support import cases
from tests.support.bad_arguments import (
    PAGES,
    QUERY,
    ROWS,
    doubled,
    flattened,
    longer,
    padded,
    per_cluster,
    rejected,
    transposed,
    with_size,
)
from tests.support.baselines import dense_attention, sparse_attention
from tests.support.compare import assert_close, assert_same_bits
from tests.support.inputs import Pages, make_decode_inputs
from vllm_clusterkv import ops, reference
from vllm_clusterkv.page_layout import PageLayout

SMALL = cases.DecodeCase((257, 300), group=2)


# More pages a split than a CUDA block looks at at once; few and all clusters selected.
WINDOWS = [
    cases.DecodeCase(
        (256 * num_pages + 7,),
        head_size=head_size,
        num_kv_heads=1,
        group=2,
        tokens_per_cluster=tokens_per_cluster,
        token_budget=token_budget,
        num_splits=1,
    )
    for num_pages, head_size, tokens_per_cluster in (
        (33, 128, 4),
        (17, 256, 4),
        (33, 96, 16),
        (65, 64, 8),
    )
    for token_budget in (500, 10**6)
]


def prepare(case):
    """Inputs on the CPU with the reference's scores and selection."""
    inputs = make_decode_inputs(case)
    scores, _ = inputs.score_all(reference)
    return inputs, scores, inputs.select(reference, scores, case.token_budget)[0]


@pytest.mark.parametrize("tail_estimate", [True, False], ids=["tail", "no_tail"])
@pytest.mark.parametrize("case", cases.ALL + WINDOWS, ids=str)
def test_output_matches_the_reference(case, tail_estimate, device):
    inputs, scores, selected = prepare(case)
    on_device = inputs.to(device)
    actual = on_device.decode(
        ops,
        scores,
        selected,
        tail_estimate=tail_estimate,
        num_splits=case.num_splits,
    )
    expected = inputs.decode(
        reference,
        scores,
        selected,
        tail_estimate=tail_estimate,
        out_dtype=torch.float32,
    )
    same_dtype = sparse_attention(inputs, scores, selected, tail_estimate)
    assert_close(actual, expected, same_dtype)
    assert_same_bits(on_device.pages.buffer, inputs.pages.buffer)
    assert (actual[on_device.seq_lens == 0] == 0).all()


@pytest.mark.parametrize("num_splits", [1, 3, 16])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_covering_budget_gives_dense_attention(dtype, num_splits, device):
    """From keys and query alone: pages are indexed and scored by the ops."""
    case = cases.DecodeCase((1285, 256, 257, 0, 512, 700), dtype, head_size=128)
    inputs = make_decode_inputs(case)
    on_device = inputs.to(device)
    for req in range(len(case.seq_lens)):
        num_indexed = inputs.num_indexed(req)
        sinks = torch.zeros(num_indexed, dtype=torch.int32, device=device)
        sinks[:1] = case.num_sink_tokens
        blocks = on_device.block_table[req, :num_indexed].contiguous()
        ops.index_pages(**on_device.pages.args(), **index(blocks, sinks))
    scores, _ = on_device.score_all(ops)
    selected, num_attended = on_device.select(ops, scores, 1285 - 1)
    assert torch.equal(num_attended, on_device.seq_lens[:, None].expand(-1, 2))
    actual = on_device.decode(ops, scores, selected, num_splits=num_splits)
    same_dtype = sparse_attention(inputs, scores.cpu(), selected.cpu(), True)
    assert_close(actual, dense_attention(inputs), same_dtype)


def index(block_ids, num_sink_tokens):
    return {
        "block_ids": block_ids,
        "num_sink_tokens": num_sink_tokens,
        "num_iters": 2,
    }


def test_splits_change_nothing_but_rounding(device):
    dtype = cases.finest_dtype(device)
    inputs, scores, selected = prepare(cases.DecodeCase((1500, 258), dtype))
    expected = inputs.decode(reference, scores, selected, out_dtype=torch.float32)
    # Weights in 16 bits are off by half an eps, of values of about 1.
    rtol = 2e-5 + torch.finfo(dtype).eps
    on_device = inputs.to(device)
    for num_splits in (1, 2, 3, 5, 6, 7, 64):
        actual = on_device.decode(ops, scores, selected, num_splits=num_splits)
        torch.testing.assert_close(
            actual.cpu().float(), expected, rtol=rtol, atol=0.5 * rtol
        )
        again = on_device.decode(ops, scores, selected, num_splits=num_splits)
        assert_same_bits(again, actual)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_a_row_does_not_depend_on_its_batch(num_splits, device):
    inputs, scores, selected = prepare(cases.DecodeCase((1500, 0, 257, 1, 600)))
    inputs = inputs.to(device)
    together = inputs.decode(ops, scores, selected, num_splits=num_splits)
    for req in range(5):
        row = slice(req, req + 1)
        alone = inputs.only(req).decode(
            ops, scores[row], selected[row], num_splits=num_splits
        )
        assert_same_bits(alone[0], together[req])


@pytest.mark.parametrize("spread", [30.0, 1e4])
@pytest.mark.parametrize("dtype", [cases.BF16, cases.FP32], ids=str)
def test_most_weights_underflow(dtype, spread, device):
    inputs = make_decode_inputs(cases.DecodeCase((1500, 20), dtype))
    inputs.scale *= spread
    scores, _ = inputs.score_all(reference)
    selected = inputs.select(reference, scores, 100)[0]
    expected = inputs.decode(reference, scores, selected, out_dtype=torch.float32)
    for num_splits in (1, 4):
        actual = inputs.to(device).decode(ops, scores, selected, num_splits=num_splits)
        eps = torch.finfo(dtype).eps  # kernels may round weights to the dtype
        torch.testing.assert_close(
            actual.cpu().float(), expected, rtol=eps, atol=max(1e-3, eps)
        )


@pytest.mark.parametrize("num_splits", [1, 3, 16])
@pytest.mark.parametrize("case", cases.DENSE, ids=str)
def test_dense_rows_are_dense_attention(case, num_splits, device):
    """Their pages have a poisoned index, and nobody scored or selected for them."""
    inputs, scores, selected = prepare(case)
    is_dense = torch.tensor([inputs.is_dense(req) for req in range(len(scores))])
    assert is_dense.any()
    assert (scores[is_dense] == float("inf")).all()
    output = inputs.to(device).decode(ops, scores, selected, num_splits=num_splits)
    assert_close(
        output.cpu()[is_dense],
        dense_attention(inputs)[is_dense],
        sparse_attention(inputs, scores, selected, True)[is_dense],
    )
    for fill in (0, 1, 255):
        selected[is_dense] = fill
        scores[is_dense] = float("nan")
        again = inputs.to(device).decode(ops, scores, selected, num_splits=num_splits)
        assert_same_bits(again, output)


def test_a_row_is_dense_below_its_min_sparse_len(device):
    """And sparse from it on, whatever the other rows of the batch are."""
    inputs, scores, selected = prepare(cases.DecodeCase((700, 700, 1300)))
    sparse = inputs.to(device).decode(ops, scores, selected)
    dense = dense_attention(inputs)
    inputs.min_sparse_lens = torch.tensor([700, 701, 1301], dtype=torch.int32)
    output = inputs.to(device).decode(ops, scores, selected)
    assert_same_bits(output[0], sparse[0])
    same_dtype = sparse_attention(inputs, scores, selected, True)
    assert_close(output[1:].cpu(), dense[1:], same_dtype[1:])
    # Its order in the page apart, everything selected is the same maths.
    assert (sparse[1:].cpu().float() - dense[1:]).norm() > 0.1 * dense[1:].norm()


def test_threads_change_nothing():
    inputs = make_decode_inputs(cases.DecodeCase((1500, 0, 257, 1, 600)))

    def run(num_threads):
        torch.set_num_threads(num_threads)
        scores, sums = inputs.score_all(ops)
        selected, num_attended = inputs.select(ops, scores, 100)
        output = inputs.decode(ops, scores, selected, num_splits=3)
        return scores, selected, num_attended, output

    for actual, expected in zip(run(2), run(1), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("num_splits", [1, 2, 7])
@pytest.mark.parametrize("position", [3, 700, 1279, 1280])
def test_a_nan_key_stays_in_its_row_and_head(position, num_splits, device):
    """1279 is the last token of page 4, 1280 alone in the tail page."""
    inputs, scores, selected = prepare(cases.DecodeCase((1281, 600)))
    selected.fill_(1)
    options = {"num_splits": num_splits}
    clean = inputs.to(device).decode(ops, scores, selected, **options)
    block = inputs.block_table[0, position // 256]
    inputs.pages.kv_cache[block, 1, position % 256, 5] = float("nan")
    output = inputs.to(device).decode(ops, scores, selected, **options)
    assert output[0, 4:].isnan().all()
    assert_same_bits(output[0, :4], clean[0, :4])
    assert_same_bits(output[1], clean[1])


@pytest.mark.parametrize("element", [2048, 2560, 3072, 4096, 6000])
def test_logits_beyond_the_integers_of_fp32(element, device):
    """Equal keys weigh the same, whatever their logit: up to 4e8 in base 2 here."""
    dtype = cases.finest_dtype(device)
    inputs, scores, selected = prepare(cases.DecodeCase((40,), dtype, head_size=64))
    inputs.query.fill_(element)
    inputs.pages.kv_cache[..., :64] = element
    values = inputs.pages.kv_cache[inputs.block_table[0, 0], :, :40, 64:]
    actual = inputs.to(device).decode(ops, scores, selected).cpu().float()
    mean = values.float().mean(1).repeat_interleave(inputs.query.shape[1] // 2, dim=0)
    torch.testing.assert_close(actual[0], mean, rtol=2e-3, atol=2e-3)


def test_unselected_rows_are_not_read(device):
    inputs, scores, selected = prepare(cases.DecodeCase((700,), num_kv_heads=1))
    clean = inputs.to(device).decode(ops, scores, selected)
    for i, block in enumerate(inputs.block_table[0, :2]):
        start = 16 if i == 0 else 0
        for c, end in enumerate(inputs.pages.cluster_ends[block, 0].tolist()):
            if not selected[0, 0, i * inputs.pages.layout.num_clusters + c]:
                inputs.pages.kv_cache[block, 0, start:end] = float("nan")
            start = end
    assert_same_bits(inputs.to(device).decode(ops, scores, selected), clean)


def decode_of_tail_rows(values, device):
    """Decode of rows with zero keys, so that all weigh the same.

    Args:
        values: [num_reqs, num_rows, head_size], a request's only rows.
    """
    num_reqs, num_rows, head_size = values.shape
    layout = PageLayout(1, head_size, 16, values.dtype)
    pages = Pages.poisoned(layout, num_reqs)
    pages.kv_cache[:, 0, :num_rows, :head_size] = 0
    pages.kv_cache[:, 0, :num_rows, head_size:] = values
    output = torch.empty(num_reqs, 1, head_size, dtype=values.dtype, device=device)
    ops.sparse_decode(
        query=torch.ones_like(output),
        **pages.to(device).args(),
        block_table=torch.arange(num_reqs, device=device).int()[:, None],
        seq_lens=torch.full((num_reqs,), num_rows, device=device).int(),
        min_sparse_lens=torch.zeros(num_reqs, dtype=torch.int32, device=device),
        scores=torch.empty(num_reqs, 1, 16, device=device),
        selected=torch.empty(num_reqs, 1, 16, dtype=torch.uint8, device=device),
        scale=1.0,
        num_sink_tokens=16,
        tail_estimate=True,
        workspace=torch.empty(num_reqs, 1, 1, head_size + 2, device=device),
        output=output,
    )
    return output[:, 0].cpu()


@pytest.mark.parametrize("dtype", [cases.BF16, cases.FP16], ids=str)
def test_one_row_is_returned_exactly(dtype, device):
    """Every 16-bit value passes, subnormals, infinities and NaN included."""
    every = torch.arange(-(2**15), 2**15).short().view(dtype).view(256, 1, 256)
    output = decode_of_tail_rows(every, device)
    assert torch.equal(output.nan_to_num(7), every[:, 0].nan_to_num(7))
    assert torch.equal(output.isinf(), every[:, 0].isinf())


@pytest.mark.parametrize("dtype", [cases.BF16, cases.FP16], ids=str)
def test_output_rounds_to_nearest_even(dtype, device):
    """Half the sum of neighbours lies midway between two representable values."""
    every = torch.arange(2**15).short().view(dtype)
    below_max = every[every < torch.finfo(dtype).max / 2]
    low = below_max[: len(below_max) // 64 * 64].view(-1, 1, 64)
    high = (low.view(torch.int16) + 1).view(dtype)
    output = decode_of_tail_rows(torch.cat([low, high], 1), device)
    expected = ((low.float() + high.float()) / 2).to(dtype)
    assert torch.equal(output, expected[:, 0])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        *PAGES,
        *ROWS,
        *QUERY,
        *per_cluster("scores", "Float"),
        *per_cluster("selected", "Byte"),
        ("scores", longer(1), r"scores.size\(1\) must equal its number of heads"),
        ("selected", longer(1), r"selected.size\(1\) must equal its number of heads"),
        ("output", flattened, r"output must have 3 dimensions, got 1"),
        ("output", doubled, r"output must have dtype BFloat16, got Double"),
        ("output", longer(0), r"output.size\(0\) must equal num_reqs \(2\), got 3"),
        ("output", longer(1), r"output.size\(1\) must equal num_heads \(4\), got 5"),
        ("output", longer(2), r"output.size\(2\) must equal head_size \(64\), got 65"),
        ("output", transposed, r"output must be dense in its last dimension"),
        ("num_sink_tokens", lambda _: 256, r"0 to block_size - 1 \(255\), got 256"),
        ("workspace", flattened, r"workspace must have 4 dimensions, got 1"),
        ("workspace", doubled, r"workspace must have dtype Float, got Double"),
        ("workspace", longer(0), r"workspace.size\(0\) must equal num_reqs \(2\)"),
        ("workspace", longer(1), r"workspace.size\(1\) must equal num_heads \(4\)"),
        ("workspace", with_size(2, 0), r"workspace.size\(2\), the splits, must be at"),
        ("workspace", longer(3), r"workspace.size\(3\) must equal head_size \+ 2"),
        ("workspace", padded, r"workspace must be contiguous"),
    ],
)
def test_bad_arguments_are_named(name, spoil, message):
    inputs, scores, selected = prepare(SMALL)
    args = inputs.decode_args(scores, selected)
    rejected(ops.sparse_decode, args, name, spoil, message)


def test_opcheck(device):
    inputs, scores, selected = prepare(SMALL)
    args = inputs.to(device).decode_args(scores, selected)
    torch.library.opcheck(
        torch.ops.clusterkv.sparse_decode.default, tuple(args.values())
    )
