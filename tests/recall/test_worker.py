# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The worker's tables and copies: decode over moved pages writes the same bits."""

import pytest
import torch

from tests.support import cases
from tests.support.compare import assert_same_bits
from tests.support.inputs import Pages, make_decode_inputs
from vllm_clusterkv import ops
from vllm_clusterkv.backend import DecodeMetadata
from vllm_clusterkv.recall.messages import (
    ClearSlot,
    IndexEntry,
    Orders,
    Release,
    SetTail,
    StartSlot,
    Transfer,
)
from vllm_clusterkv.recall.worker import HostTier, page_count

CASE = cases.DecodeCase((1300, 900, 0, 1025), cases.FP32, token_budget=300)
LAYER = "model.layers.0.attn"
SPARE = 2  # blocks for entries


def make(poison_released=True):
    """A batch, its pages in a longer buffer, and a tier over them as its one layer."""
    inputs = make_decode_inputs(CASE)
    layout, num_blocks = inputs.pages.layout, len(inputs.pages.kv_cache)
    pages = Pages.poisoned(layout, num_blocks + SPARE)
    pages.buffer[: len(inputs.pages.buffer)] = inputs.pages.buffer
    inputs.pages = pages
    width = inputs.block_table.shape[1]
    tier = HostTier(layout, {LAYER: pages.kv_cache}, 12, 3, width, 0, poison_released)
    return inputs, tier, num_blocks


def tail_block(inputs, req):
    return int(inputs.block_table[req, (int(inputs.seq_lens[req]) - 1) // 256])


def resolved(tier, inputs):
    return tier.resolve(
        LAYER,
        DecodeMetadata(inputs.block_table, inputs.seq_lens, inputs.min_sparse_lens),
    )


def run(inputs, tier):
    rows = resolved(tier, inputs)
    query = inputs.query
    inputs.block_table, inputs.index_table = rows.block_table, rows.index_table
    inputs.host_cache = tier.host_pages(LAYER).host_cache
    scores, sums = inputs.score_all(ops)
    selected, _ = inputs.select(ops, scores, CASE.token_budget, sums)
    assert inputs.query is query
    return scores, inputs.decode(ops, scores, selected)


def expected():
    inputs = make_decode_inputs(CASE)
    scores, sums = inputs.score_all(ops)
    selected, _ = inputs.select(ops, scores, CASE.token_budget, sums)
    return scores, inputs.decode(ops, scores, selected)


def move(inputs, slot, req, pages, first_host_page, first_entry, entry_block):
    """Orders of two steps: copies of a request's pages, and their release."""
    blocks = [int(inputs.block_table[req, page]) for page in pages]
    entries = [IndexEntry(entry_block, first_entry + 2 * i) for i in range(len(pages))]
    copies = Orders(
        [StartSlot(slot), SetTail(slot, tail_block(inputs, req))],
        [],
        [
            Transfer(first_host_page + i, block, first_host_page + i, entry)
            for i, (block, entry) in enumerate(zip(blocks, entries, strict=True))
        ],
    )
    releases = Orders(
        [
            Release(slot, page, first_host_page + i, entry)
            for i, (page, entry) in enumerate(zip(pages, entries, strict=True))
        ],
        blocks,
    )
    return copies, releases


def test_decode_over_moved_pages_writes_the_same_bits():
    inputs, tier, spare = make()
    first = move(inputs, 2, 0, [1, 3, 4], 5, 0, spare)
    second = move(inputs, 0, 3, [2, 1], 0, 1, spare + 1)
    for orders in (*first, *second):
        tier.apply(orders)
    assert tier.take_completed() == [5, 6, 7, 0, 1] and tier.take_completed() == []
    moved = inputs.block_table[0, 1]
    assert inputs.pages.kv_cache[moved].isnan().all()
    for actual, should_be in zip(run(inputs, tier), expected(), strict=True):
        assert_same_bits(actual, should_be)


def test_copies_are_not_used_before_their_release():
    inputs, tier, spare = make()
    copies, _ = move(inputs, 2, 0, [1, 3], 5, 0, spare)
    tier.apply(copies)
    tier.pool.fill_(float("nan"))
    assert torch.equal(resolved(tier, inputs).block_table, inputs.block_table)
    for actual, should_be in zip(run(inputs, tier), expected(), strict=True):
        assert_same_bits(actual, should_be)


def test_only_the_row_with_the_slots_tail_is_resolved():
    inputs, tier, spare = make(poison_released=False)
    for orders in move(inputs, 1, 0, [1], 0, 0, spare):
        tier.apply(orders)
    changed = resolved(tier, inputs).block_table != inputs.block_table
    assert changed.nonzero().tolist() == [[0, 1]]
    # A padding row that shows the slot's tail block.
    inputs.block_table[2, 0] = tail_block(inputs, 0)
    assert (resolved(tier, inputs).block_table[2] == inputs.block_table[2]).all()
    # Another tail: another request, or none that has a slot.
    tier.apply(Orders([SetTail(1, tail_block(inputs, 1))]))
    changed = resolved(tier, inputs).block_table != inputs.block_table
    assert changed.nonzero().tolist() == [[1, 1]]
    tier.apply(Orders([ClearSlot(1)]))
    assert torch.equal(resolved(tier, inputs).block_table, inputs.block_table)


def test_commands_act_in_their_order():
    """A slot cleared and taken again in one step belongs to the second request."""
    inputs, tier, spare = make(poison_released=False)
    for orders in move(inputs, 0, 0, [1], 0, 0, spare):
        tier.apply(orders)
    tail = SetTail(0, tail_block(inputs, 3))
    tier.apply(Orders([ClearSlot(0), StartSlot(0), tail]))
    assert torch.equal(resolved(tier, inputs).block_table, inputs.block_table)


def test_poison_comes_before_copies():
    """A block that is given away may receive entries in the same step."""
    inputs, tier, spare = make()
    block = int(inputs.block_table[0, 1])
    index = inputs.pages.bytes_of_blocks()[block, inputs.pages.layout.kv_bytes :]
    tier.apply(Orders([], [spare], [Transfer(0, block, 3, IndexEntry(spare, 1))]))
    size = inputs.pages.layout.entry_bytes
    is_ = inputs.pages.bytes_of_blocks()[spare]
    assert torch.equal(is_[size : 2 * size], index)
    assert (is_[:size] == -1).all() and (is_[2 * size :] == -1).all()


def test_entries_are_copied_without_padding():
    """Which holds anything; where entries were, FlashAttention must not find NaN."""
    inputs, tier, spare = make(poison_released=False)
    layout = inputs.pages.layout
    padding = layout.page_bytes - layout.used_bytes
    assert padding > 0
    inputs.pages.bytes_of_blocks()[spare] = 0
    block = int(inputs.block_table[0, 1])
    tier.apply(Orders([], [], [Transfer(0, block, 3, IndexEntry(spare, 1))]))
    entry = inputs.pages.bytes_of_blocks()[spare, layout.entry_bytes :]
    entry = entry[: layout.entry_bytes]
    assert (entry[:-padding] != 0).any() and not (entry[-padding:] != 0).any()


@pytest.mark.parametrize(("gib", "pages"), [(0, 0), (1, 34), (0.5, 17)])
def test_pages_of_so_much_memory(gib, pages):
    layout = make_decode_inputs(CASE).pages.layout  # 2 heads of 64 in fp32
    assert layout.kv_bytes == 2 * 256 * 128 * 4
    assert page_count(gib, layout, 120) == pages
