# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""``recall`` does what the reference does, step after step, to the bit; and whatever
the hot blocks hold, ``sparse_decode`` writes what it writes without them."""

from dataclasses import dataclass

import pytest
import torch

from tests.support import cases
from tests.support.bad_arguments import (
    PAGES,
    ROWS,
    doubled,
    flattened,
    longer,
    rejected,
)
from tests.support.compare import assert_same_bits
from tests.support.inputs import DecodeInputs, Pages, make_decode_inputs
from vllm_clusterkv import ops, reference
from vllm_clusterkv.page_layout import COUNTERS, LINES_PER_PAGE, MASS_UNIT

CASES = [
    cases.DecodeCase((2600, 1025, 513, 0, 257), token_budget=300),
    cases.DecodeCase((1537, 2100), cases.FP32, head_size=128, token_budget=10**6),
    cases.DecodeCase((1800, 900), cases.FP16, tokens_per_cluster=4, token_budget=100),
    cases.DecodeCase((1800, 900), group=7, tokens_per_cluster=16, num_sink_tokens=0),
    cases.DecodeCase((1500, 1900), min_sparse_lens=(2000, 0), num_splits=7),
]


@dataclass
class HotCache:
    """The state of a layer that ``recall`` keeps, and the batch's slots."""

    row_slots: torch.Tensor
    hot_blocks: torch.Tensor
    line_table: torch.Tensor
    hot_lines: torch.Tensor
    hot_order: torch.Tensor
    counters: torch.Tensor

    def to(self, device: str) -> "HotCache":
        """A copy on ``device``."""
        return HotCache(
            **{name: t.to(device, copy=True) for name, t in vars(self).items()}
        )


def make(case, num_hot_blocks: int, device: str) -> tuple[DecodeInputs, HotCache]:
    """A batch with pages on the host, and hot blocks behind the others, full of NaN."""
    inputs = make_decode_inputs(case).spilled()
    pages = inputs.pages
    num_reqs, num_slots, first = len(inputs.seq_lens), 7, len(pages.kv_cache)
    grown = Pages.poisoned(pages.layout, first + num_slots * num_hot_blocks)
    grown.buffer[: len(pages.buffer)] = pages.buffer
    inputs.pages = grown
    generator = torch.Generator().manual_seed(1)
    slots = torch.randperm(num_slots, generator=generator)[:num_reqs].int()
    slots[inputs.seq_lens == 0] = -1
    blocks = torch.randperm(num_slots * num_hot_blocks, generator=generator) + first
    shape = (num_slots, case.num_kv_heads, num_hot_blocks * LINES_PER_PAGE)
    order = torch.rand(shape, generator=generator).argsort(-1)
    hot_cache = HotCache(
        slots,
        blocks.int().view(num_slots, num_hot_blocks),
        torch.full(
            (len(inputs.host_cache), case.num_kv_heads, LINES_PER_PAGE),
            -1,
            dtype=torch.int32,
        ),
        torch.full(shape, -1, dtype=torch.int32),
        order.int(),
        torch.zeros(len(COUNTERS), dtype=torch.int64),
    )
    return inputs.to(device), hot_cache.to(device)


def recall_args(inputs, scores, selected, hot_cache) -> dict:
    return {
        "selected": selected,
        "scores": scores,
        **inputs.pages.args(),
        "block_table": inputs.block_table,
        "seq_lens": inputs.seq_lens,
        "min_sparse_lens": inputs.min_sparse_lens,
        "num_sink_tokens": inputs.num_sink_tokens,
        "index_table": inputs.index_table,
        "host_cache": inputs.host_cache,
        **vars(hot_cache),
    }


def step(inputs, case, seed: int):
    """Scores and selection, by a query that resembles the last step's."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(inputs.query.shape, generator=generator).to(inputs.query.device)
    inputs.query = (inputs.query.float() + noise).to(inputs.query.dtype)
    scores, sums = inputs.score_all(ops)
    return scores, inputs.select(ops, scores, case.token_budget, sums)[0]


@pytest.mark.parametrize("num_hot_blocks", [1, 2, 12])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_those_of_the_reference(case, num_hot_blocks, device):
    inputs, actual = make(case, num_hot_blocks, device)
    twin, expected = make(case, num_hot_blocks, "cpu")
    for seed in range(5):
        scores, selected = step(inputs, case, seed)
        ops.recall(**recall_args(inputs, scores, selected, actual))
        of_twin = scores.cpu(), selected.cpu()
        reference.recall(**recall_args(twin, *of_twin, expected))
        counts, counted = actual.counters.tolist(), expected.counters.tolist()
        assert counts[:4] == counted[:4] and counts[4] > 0
        assert counts[5] * MASS_UNIT == pytest.approx(counted[5] * MASS_UNIT, abs=1e-3)
        assert counts[6] == counted[6]
        for name, tensor in vars(actual).items():
            if name != "counters":
                assert_same_bits(tensor, getattr(expected, name))
        assert_same_bits(inputs.pages.buffer, twin.pages.buffer)
        check_tables(twin, expected)

        plain = inputs.decode(ops, scores, selected, num_splits=case.num_splits)
        args = inputs.decode_args(scores, selected, num_splits=case.num_splits)
        ops.sparse_decode(**args, line_table=actual.line_table)
        assert_same_bits(args["output"], plain)

        twin.query = inputs.query.cpu()
        plain = twin.decode(reference, *of_twin)
        args = twin.decode_args(*of_twin)
        reference.sparse_decode(**args, line_table=expected.line_table)
        assert_same_bits(args["output"], plain)
    found, recalled, left, _, _, mass, num_samples = counts
    assert recalled > 0
    if any(seq_len % 64 == 1 for seq_len in case.seq_lens):
        assert num_samples > 0 and 0 < mass * MASS_UNIT / num_samples <= 1.001
    if num_hot_blocks == 12:
        assert left == 0 and found > 0
    if num_hot_blocks == 1 and case.token_budget > 2000:
        assert left > 0


def check_tables(inputs, hot_cache) -> None:
    """The table says what positions hold, and nothing else; no line twice."""
    table = torch.full_like(hot_cache.line_table, -1)
    for req, slot in enumerate(hot_cache.row_slots.tolist()):
        if slot < 0:
            continue
        for head, held in enumerate(hot_cache.hot_lines[slot].tolist()):
            lines = [line for line in held if line >= 0]
            assert len(lines) == len(set(lines))
            for position, line in enumerate(held):
                if line < 0:
                    continue
                page, at = divmod(line, LINES_PER_PAGE)
                host_page = -1 - int(inputs.block_table[req, page])
                assert host_page >= 0
                hot, row = divmod(position, LINES_PER_PAGE)
                block = int(hot_cache.hot_blocks[slot, hot])
                table[host_page, head, at] = block * LINES_PER_PAGE + row
                copy = inputs.pages.kv_cache[block, head, row * 8 : row * 8 + 8]
                source = inputs.host_cache[host_page, head, at * 8 : at * 8 + 8]
                assert_same_bits(copy, source)
    assert torch.equal(table, hot_cache.line_table)
    orders = hot_cache.hot_order.sort(-1).values
    assert (orders == torch.arange(orders.shape[-1])).all()


def test_the_hot_blocks_are_what_is_read(device):
    """A recalled line spoilt on the host changes nothing, in its hot block it does."""
    case = CASES[0]
    inputs, hot_cache = make(case, 12, device)
    scores, selected = step(inputs, case, 0)
    ops.recall(**recall_args(inputs, scores, selected, hot_cache))
    args = inputs.decode_args(scores, selected)
    ops.sparse_decode(**args, line_table=hot_cache.line_table)
    expected = args["output"].cpu()  # and waits, before what they read changes
    inputs.host_cache.fill_(float("nan"))
    args = inputs.decode_args(scores, selected)
    ops.sparse_decode(**args, line_table=hot_cache.line_table)
    assert_same_bits(args["output"], expected)
    inputs.pages.kv_cache[hot_cache.hot_blocks[hot_cache.row_slots[0]].long()] = 0
    args = inputs.decode_args(scores, selected)
    ops.sparse_decode(**args, line_table=hot_cache.line_table)
    assert not torch.equal(args["output"].cpu(), expected)


def test_rows_without_a_slot_and_dense_rows_are_passed_over(device):
    case = CASES[4]  # its first row is dense
    inputs, hot_cache = make(case, 2, device)
    hot_cache.row_slots[1] = -1
    before = hot_cache.to("cpu")
    scores, selected = step(inputs, case, 0)
    ops.recall(**recall_args(inputs, scores, selected, hot_cache))
    for name, tensor in vars(hot_cache).items():
        assert_same_bits(tensor, getattr(before, name))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        *PAGES,
        *ROWS,
        ("host_cache", longer(1), r"host_cache.size\(1\) must equal num_kv_heads"),
        ("index_table", longer(1), r"index_table.size\(1\) must equal max_blocks"),
        ("row_slots", doubled, r"row_slots must have dtype Int, got Long"),
        ("row_slots", longer(0), r"row_slots.size\(0\) must equal num_reqs \(2\)"),
        ("hot_blocks", flattened, r"hot_blocks must have 2 dimensions, got 1"),
        ("hot_lines", longer(0), r"hot_lines.size\(0\) must equal num_slots"),
        ("hot_lines", longer(1), r"hot_lines.size\(1\) must equal num_kv_heads"),
        ("hot_order", longer(2), r"hot_order.size\(2\) must equal the lines of a slot"),
        ("scores", doubled, r"scores must have dtype Float, got Double"),
        ("scores", longer(0), r"scores.size\(0\) must equal num_reqs"),
        ("scores", longer(2), r"scores.size\(2\) must"),
        (
            "line_table",
            longer(0),
            r"line_table.size\(0\) must equal host_cache's pages",
        ),
        ("line_table", longer(2), r"line_table.size\(2\) must equal block_size / 8"),
        ("counters", lambda t: t.int(), r"counters must have dtype Long, got Int"),
        ("counters", longer(0), r"counters.size\(0\) must equal what recall counts"),
    ],
)
def test_bad_arguments_are_named(name, spoil, message):
    case = cases.DecodeCase((1500, 1300), group=2)
    inputs, hot_cache = make(case, 1, "cpu")
    scores, selected = step(inputs, case, 0)
    rejected(
        ops.recall,
        recall_args(inputs, scores, selected, hot_cache),
        name,
        spoil,
        message,
    )
