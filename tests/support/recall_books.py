# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Whether the books of the host tier and of vLLM's block pool add up."""

from collections import Counter

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from vllm_clusterkv.recall.books import Books, PageState


def check_books(
    books: Books,
    manager: SingleTypeKVCacheManager,
    pool: BlockPool,
    num_host_pages: int,
    max_slots: int,
) -> None:
    """Asserts that everything has exactly one owner, and that none is forgotten."""
    spilled = books.spilled
    pages = [
        (request_id, number, page)
        for request_id, state in spilled.items()
        for number, page in state.pages.items()
    ]
    late = [copy for copy in books._copies.values() if copy.owner.ended]

    host_pages = [
        *books._free_host_pages,
        *(page.host_page for *_, page in pages),
        *(copy.page.host_page for copy in late),
    ]
    assert sorted(host_pages) == list(range(num_host_pages))
    slots = [*books._free_slots, *(state.slot for state in spilled.values())]
    assert sorted(slots) == list(range(max_slots))

    for state in spilled.values():
        entries = [*state.free_entries, *(p.entry for p in state.pages.values())]
        assert sorted((entry.block, entry.number) for entry in entries) == sorted(
            (block.block_id, number)
            for block in state.index_blocks
            for number in range(books._entries_per_block)
        )

    _check_blocks(books, manager, pool)

    clean = []
    for request_id, number, page in pages:
        blocks = manager.req_to_blocks[request_id]
        assert 0 < number < len(blocks) - 1, "the sinks or the tail left"
        copying = [copy for copy in books._copies.values() if copy.page is page]
        if page.state is PageState.COPYING:
            assert blocks[number] is page.block and len(copying) == 1
        else:
            assert blocks[number].is_null and not copying
        if page.state is PageState.CLEAN:
            clean.append((page.block.block_id, id(spilled[request_id]), number))
    assert sorted(clean) == sorted(
        (block, id(state), number)
        for block, owners in books._owners.items()
        for state, number in owners
    )
    assert all(books._owners.values())

    counts = books.counts()
    by_state = Counter(page.state for *_, page in pages)
    assert counts.num_copying == by_state[PageState.COPYING] + len(late)
    assert counts.num_clean == by_state[PageState.CLEAN]
    assert counts.num_released == by_state[PageState.RELEASED]
    assert counts.num_free_host_pages == len(books._free_host_pages)
    assert counts.num_slots == len(spilled)
    assert books.num_pending == len(books._copies)
    assert books.num_pending_frees == len(books._copies) - len(late)


def _check_blocks(
    books: Books, manager: SingleTypeKVCacheManager, pool: BlockPool
) -> None:
    holders: Counter[int] = Counter()
    for blocks in manager.req_to_blocks.values():
        holders.update(block.block_id for block in blocks if not block.is_null)
    for state in books.spilled.values():
        own = [*state.index_blocks, *state.hot_blocks]
        holders.update(block.block_id for block in own)
        for block in own:
            assert holders[block.block_id] == 1, "a block of the tier has two owners"
        assert len(state.hot_blocks) == books._num_hot_blocks
    for block in pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == holders[block.block_id]
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(holders)
