# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The scheduler's half of the host tier, rule by rule, on vLLM's real scheduler.

Blocks are of 4 tokens. ``ALL`` as watermark asks for every page that may leave. Every
step also checks the books and what the workers find (``recall_engine``).
"""

import pytest
import vllm
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput

from tests.support import recall_engine
from tests.support.recall_engine import BLOCK, Engine, make_engine
from vllm_clusterkv.recall.messages import (
    ClearSlot,
    Orders,
    Release,
    SetTail,
    StartSlot,
)
from vllm_clusterkv.recall.scheduler import RESERVED_BLOCKS, RecallScheduler

ALL = 1.0
HELD = 10**6  # Steps: until complete().


def prompt(num_tokens: int, first: int = 1) -> list[int]:
    return [(first + i) % 500 + 1 for i in range(num_tokens)]


def complete(engine: Engine) -> None:
    """Lets the copies under way complete in the next step."""
    for worker in engine.workers:
        for copy in worker.pending:
            copy.steps_left = 1


def blocks_of(engine: Engine, request_id: str) -> list[int]:
    return [block.block_id for block in engine.manager.req_to_blocks[request_id]]


def pages_ordered(engine: Engine, request_id: str) -> list[int]:
    """Pages of a request that the last step's transfers copy."""
    blocks = blocks_of(engine, request_id)
    ordered = [transfer.block for transfer in engine.orders.transfers]
    return [blocks.index(block) for block in ordered if block in blocks]


def kinds(orders: Orders) -> list[type]:
    return [type(command) for command in orders.commands]


def spill_all(engine: Engine, request_id: str, num_tokens: int) -> None:
    """Steps until all of a new request's pages but the first and the tail are clean."""
    engine.add(request_id, prompt(num_tokens), max_tokens=60)
    while not engine.orders.transfers:
        engine.step()
    complete(engine)
    engine.step()


def test_without_pressure_nothing_is_ordered(tmp_path):
    engine = make_engine(tmp_path, num_blocks=60)
    for name in "abc":
        engine.add(name, prompt(30, first=ord(name)), max_tokens=20)
    while engine.scheduler.has_requests():
        engine.step()
        assert engine.orders == Orders()
    assert engine.books.counts().total_copied == 0


def test_life_of_a_page(tmp_path):
    # 11 blocks: a takes 7, b needs 5 and as many more free as are reserved.
    engine = make_engine(tmp_path, num_blocks=12, delay=lambda: HELD)
    engine.add("a", prompt(24), max_tokens=12)
    engine.step()
    engine.step()
    assert engine.orders == Orders()
    held = blocks_of(engine, "a")

    engine.add("b", prompt(20, first=200), max_tokens=4)
    engine.step()
    # Short: 5 + 2 - 4. Five pages leave and two index blocks, of 3 entries each, come.
    assert pages_ordered(engine, "a") == [1, 2, 3, 4, 5]
    assert engine.orders.commands == [StartSlot(0), SetTail(0, held[6])]
    assert len({transfer.host_page for transfer in engine.orders.transfers}) == 5
    assert len({transfer.entry for transfer in engine.orders.transfers}) == 5
    assert engine.books.num_pending == engine.books.num_pending_frees == 5
    assert blocks_of(engine, "a") == held
    assert engine.pool.get_num_free_blocks() == 2
    transfers = {t.block: t for t in engine.orders.transfers}

    complete(engine)
    engine.step()
    # Clean: free for vLLM, and read by a; the workers' model has done so.
    assert engine.pool.get_num_free_blocks() == 2 + 5
    assert blocks_of(engine, "a")[1:6] == [engine.manager._null_block.block_id] * 5
    assert engine.books.counts().num_clean == 5
    assert engine.books.num_pending == 0

    engine.step()
    # b takes two blocks that were free and three clean ones.
    assert kinds(engine.orders) == [Release] * 3
    assert engine.orders.reused_blocks == [
        block for block in blocks_of(engine, "b") if block in held
    ]
    for command, block in zip(
        engine.orders.commands, engine.orders.reused_blocks, strict=True
    ):
        page = held.index(block)
        transfer = transfers[block]
        assert command == Release(0, page, transfer.host_page, transfer.entry)
    counts = engine.books.counts()
    assert (counts.num_clean, counts.num_released) == (2, 3)
    assert (counts.total_copied, counts.total_released) == (5, 3)

    while engine.scheduler.has_requests():
        complete(engine)
        engine.step()
    counts = engine.books.counts()
    assert (counts.num_clean, counts.num_released, counts.num_slots) == (0, 0, 0)
    assert counts.num_free_host_pages == 64
    assert engine.pool.get_num_free_blocks() == 11
    assert engine.num_preemptions == 0


def test_a_copy_counts_when_all_ranks_have_completed_it(tmp_path):
    engine = make_engine(
        tmp_path, num_blocks=30, delay=lambda: HELD, world_size=2, watermark=ALL
    )
    engine.add("a", prompt(12), max_tokens=20)
    engine.step()
    engine.step()
    assert pages_ordered(engine, "a") == [1, 2]
    held = blocks_of(engine, "a")
    first, second = engine.workers
    first.pending[0].steps_left = 1
    engine.step()
    assert engine.books.num_pending == 2 and blocks_of(engine, "a")[:3] == held[:3]
    first.pending[0].steps_left = second.pending[0].steps_left = 1
    engine.step()
    assert engine.books.num_pending == 1
    assert blocks_of(engine, "a")[:3] == [held[0], 0, held[2]]
    second.pending[0].steps_left = 1
    engine.step()
    assert engine.books.num_pending == 0
    assert blocks_of(engine, "a")[:3] == [held[0], 0, 0]


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_an_ended_request_gives_back_all_but_host_pages_under_way(tmp_path, end):
    engine = make_engine(tmp_path, num_blocks=30, delay=lambda: HELD, watermark=ALL)
    spill_all(engine, "a", num_tokens=13)
    while not engine.orders.transfers:
        engine.step()
    assert engine.books.counts().num_clean == 2 and engine.books.num_pending == 1

    if end == "abort":
        engine.abort("a")
        # No block is held: this would fail.
        assert engine.scheduler.reset_prefix_cache()
    else:
        assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.check_books()
    counts = engine.books.counts()
    assert (counts.num_slots, counts.num_clean, counts.num_copying) == (0, 0, 1)
    assert counts.num_free_host_pages == 63
    assert engine.books.num_pending == 1 and engine.books.num_pending_frees == 0
    # The engine must go on for the copy's sake.
    assert engine.scheduler.has_requests()
    engine.step()
    assert engine.orders.commands[:1] == [ClearSlot(0)]
    assert Release not in kinds(engine.orders)

    if end == "preempt":
        engine.abort("a")
    complete(engine)
    engine.step()
    assert engine.books.counts().num_free_host_pages == 64
    assert engine.books.counts().total_late >= 1
    engine.drain()
    assert engine.pool.get_num_free_blocks() == 29


def test_a_slot_may_change_hands_within_a_step(tmp_path):
    engine = make_engine(
        tmp_path, num_blocks=40, delay=lambda: HELD, watermark=ALL, max_slots=1
    )
    engine.add("a", prompt(30), max_tokens=40)
    engine.add("b", prompt(20, first=100), max_tokens=40)
    for _ in range(6):
        engine.step()
    assert set(engine.books.spilled) == {"a"}
    engine.abort("a")
    engine.step()
    tail = blocks_of(engine, "b")[engine.rows[0].num_computed // BLOCK]
    assert engine.orders.commands == [ClearSlot(0), StartSlot(0), SetTail(0, tail)]
    assert pages_ordered(engine, "b") == [1, 2, 3, 4, 5]


def test_the_slot_s_owner_goes_first_then_the_longest(tmp_path):
    engine = make_engine(
        tmp_path,
        num_blocks=60,
        delay=lambda: HELD,
        watermark=ALL,
        max_num_batched_tokens=128,
    )
    engine.add("short", prompt(13), max_tokens=60)
    engine.step()
    engine.step()
    assert engine.books.num_pending == 2
    engine.add("long", prompt(29, first=100), max_tokens=60)
    engine.add("longer", prompt(38, first=200), max_tokens=60)
    for _ in range(2):
        engine.step()
    assert list(engine.books.spilled) == ["short", "longer", "long"]
    assert pages_ordered(engine, "longer")[:8] == list(range(1, 9))
    complete(engine)
    for _ in range(4):  # Until the first has another page.
        engine.step()
    assert engine.books.spilled["short"].pages.keys() == {1, 2, 3}


def test_transfers_under_way_are_limited(tmp_path):
    engine = make_engine(
        tmp_path, num_blocks=60, delay=lambda: HELD, watermark=ALL, max_transfers=3
    )
    engine.add("a", prompt(50), max_tokens=60)
    for _ in range(4):
        engine.step()
    assert engine.books.num_pending == 3
    complete(engine)
    engine.step()
    engine.step()
    assert pages_ordered(engine, "a") == [4, 5, 6]


@pytest.mark.parametrize("num_host_pages, num_spilled", [(0, 0), (1, 0), (3, 3)])
def test_a_host_pool_too_small(tmp_path, num_host_pages, num_spilled):
    # For one page alone an index block is not worth its room.
    engine = make_engine(
        tmp_path, num_blocks=40, watermark=ALL, num_host_pages=num_host_pages
    )
    engine.add("a", prompt(50), max_tokens=20)
    for _ in range(4):
        engine.step()
    assert engine.books.counts().total_copied == num_spilled
    assert engine.books.counts().num_slots == bool(num_spilled)


def test_without_room_on_the_host_vllm_preempts(tmp_path):
    engine = make_engine(tmp_path, num_blocks=12, num_host_pages=0)
    engine.add("a", prompt(14), max_tokens=20)
    engine.add("b", prompt(14, first=100), max_tokens=20)
    engine.drain()
    assert engine.num_preemptions > 0


def test_with_copies_under_way_vllm_waits_instead(tmp_path):
    # Both need 8 blocks at last, of 11.
    engine = make_engine(tmp_path, num_blocks=12, watermark=0.2, delay=lambda: 3)
    engine.add("a", prompt(14), max_tokens=18)
    engine.add("b", prompt(14, first=100), max_tokens=18)
    num_empty = 0
    while engine.scheduler.has_requests():
        engine.step()
        num_empty += not engine.rows
    assert engine.num_preemptions == 0
    assert engine.books.counts().total_released > 0
    assert num_empty > 0


def test_short_requests_keep_their_pages(tmp_path):
    engine = make_engine(tmp_path, num_blocks=40, watermark=ALL, min_spillable_len=30)
    request = engine.add("a", prompt(20), max_tokens=20)
    while not engine.orders.transfers:
        assert request.num_tokens <= 30
        engine.step()
    assert request.num_tokens == 31  # With the one that this step sampled.


def test_rows_of_prompts_keep_their_pages(tmp_path):
    # 49 tokens in chunks of 16: the fourth is of a single token, like a decode step.
    engine = make_engine(
        tmp_path, num_blocks=40, watermark=ALL, max_num_batched_tokens=16
    )
    engine.add("a", prompt(49), max_tokens=20)
    for num_new in (16, 16, 16, 1):
        engine.step()
        assert engine.rows[0].num_new == num_new
        assert engine.orders == Orders()
    engine.step()
    assert engine.orders.transfers


def test_a_resumed_request_keeps_its_pages_in_its_first_step(tmp_path):
    # Preempted with one token generated, it finds all others in the prefix cache: its
    # row has one token, like a decode step's, but is dense.
    engine = make_engine(tmp_path, num_blocks=40, watermark=ALL)
    engine.add("a", prompt(24), max_tokens=20)
    engine.step()
    engine.scheduler._preempt_request(engine.scheduler.running.pop(), 0.0)
    engine.step()
    (row,) = engine.rows
    assert (row.num_computed, row.num_new, row.decodes) == (24, 1, False)
    assert engine.orders == Orders()
    engine.step()
    assert engine.books.counts().total_copied == 5


def test_streaming_requests_keep_their_pages(tmp_path):
    engine = make_engine(tmp_path, num_blocks=40, watermark=ALL)
    engine.add("a", prompt(30), max_tokens=8, resumable=True)
    for _ in range(6):
        engine.step()
        assert engine.orders == Orders()


def test_shared_pages_stay_until_they_are_not(tmp_path):
    # Of 9 pages each, the first 7 are the same.
    engine = make_engine(tmp_path, num_blocks=60, watermark=ALL)
    engine.add("a", prompt(28) + prompt(8, first=300), max_tokens=40)
    engine.add("b", prompt(28) + prompt(8, first=400), max_tokens=40)
    for _ in range(8):
        engine.step()
    pages = {name: state.pages.keys() for name, state in engine.books.spilled.items()}
    assert pages["a"] == pages["b"] == {7, 8, 9}
    assert engine.recall._fruitless
    engine.abort("b")
    engine.step()
    engine.step()
    assert engine.books.spilled["a"].pages.keys() >= {1, 2, 3, 4, 5, 6}


def test_a_clean_page_may_get_other_owners(tmp_path):
    engine = make_engine(tmp_path, num_blocks=30, watermark=ALL, max_transfers=6)
    spill_all(engine, "a", num_tokens=21)
    held = {state.block.block_id for state in engine.books.spilled["a"].pages.values()}
    # The same prompt: it hits a's clean pages, owns them, and spills them too.
    engine.add("b", prompt(21), max_tokens=60)
    engine.step()
    assert held <= set(blocks_of(engine, "b"))
    for _ in range(3):
        engine.step()
    assert {block for block, o in engine.books._owners.items() if len(o) == 2} == held
    # Whoever takes them now takes them from both.
    engine.add("c", prompt(80, first=200), max_tokens=4)
    released: list[set[int]] = [set(), set()]
    while engine.scheduler.has_requests() and not released[0] >= {1, 2, 3}:
        engine.step()
        for command in engine.orders.commands:
            if isinstance(command, Release):
                released[command.slot].add(command.page)
        assert released[0] == released[1]
    assert released[0] >= {1, 2, 3}


def test_an_index_block_may_be_the_request_s_own_clean_page(tmp_path):
    engine = make_engine(
        tmp_path, num_blocks=20, watermark=ALL, entries_per_block=2, max_transfers=2
    )
    engine.add("a", prompt(60), max_tokens=16)
    own = 0
    while engine.scheduler.has_requests():
        engine.step()
        released = [c for c in engine.orders.commands if isinstance(c, Release)]
        taken = {t.entry.block for t in engine.orders.transfers}
        own += bool(released) and bool(taken & set(engine.orders.reused_blocks))
    assert own > 0


def test_nothing_is_planned_for_a_step_without_tokens(tmp_path):
    engine = make_engine(tmp_path, num_blocks=30, delay=lambda: HELD, watermark=ALL)
    engine.add("a", prompt(21), max_tokens=20)
    engine.step()
    assert engine.recall.plan(SchedulerOutput.make_empty()) == Orders()
    # But what has changed is told.
    engine.step()
    engine.abort("a")
    orders = engine.recall.plan(SchedulerOutput.make_empty())
    assert orders == Orders(commands=[ClearSlot(0)])


def test_the_tail_is_the_block_of_the_step_s_token_when_scheduling_ahead(tmp_path):
    engine = make_engine(tmp_path, num_blocks=40, watermark=ALL, asynchronous=True)
    engine.add("a", prompt(14), max_tokens=40)
    engine.add("b", prompt(17, first=100), max_tokens=40)
    num_moves = 0
    while engine.scheduler.has_requests():
        engine.step()
        num_moves += kinds(engine.orders).count(SetTail)
        for row in engine.rows:
            if row.request_id in engine.books.spilled:
                slot = engine.books.spilled[row.request_id].slot
                table = engine.workers[0].block_tables[row.request_id]
                tail = engine.workers[0].tails[slot]
                assert tail == table[row.num_computed // BLOCK]
    assert num_moves > 10


def test_a_waiting_request_s_hits_on_free_blocks_are_no_gain(tmp_path):
    # 19 blocks: a takes 9; b's 8 pages are cached and free, it needs 9 + 2 reserved.
    engine = make_engine(tmp_path, num_blocks=20, delay=lambda: HELD)
    engine.add("b", prompt(33, first=200), max_tokens=1)
    engine.drain()
    engine.add("a", prompt(34), max_tokens=30)
    engine.step()
    engine.step()
    assert engine.pool.get_num_free_blocks() == 10
    engine.add("b2", prompt(33, first=200), max_tokens=1)
    engine.step()
    assert [row.request_id for row in engine.rows] == ["a"]
    assert engine.orders.transfers


def test_late_copies_do_not_hold_up_admission(tmp_path, monkeypatch):
    """On a GPU a copy is done some steps later, in which others take blocks."""
    block = 32
    monkeypatch.setattr(recall_engine, "BLOCK", block)

    def num_steps(delay: int) -> int:
        engine = make_engine(
            tmp_path,
            num_blocks=200,
            num_host_pages=2000,
            entries_per_block=15,
            delay=lambda: delay,
            max_slots=16,
            max_transfers=16,
            watermark=0.05,
            max_model_len=2048,
            max_num_batched_tokens=2048,
            max_num_seqs=16,
            asynchronous=True,
        )
        for i in range(16):
            length = 30 * block + 3 * i
            tokens = [(37 * i + k * (i + 2)) % 500 + 1 for k in range(length)]
            engine.add(f"r{i}", tokens, max_tokens=10 * block)
        number = 0
        while engine.scheduler.has_requests():
            engine.step()
            number += 1
        return number

    assert num_steps(delay=3) < 1.3 * num_steps(delay=1)


@pytest.mark.parametrize("num_tokens, leave", [(17, True), (21, False)])
def test_no_page_leaves_for_a_request_that_waits_anyhow(tmp_path, num_tokens, leave):
    # 11 blocks: a takes 7, of which 5 pages may leave for 2 index blocks. b needs 5 or
    # 6, and 2 reserved.
    engine = make_engine(tmp_path, num_blocks=12)
    engine.add("a", prompt(25), max_tokens=3)
    engine.step()
    engine.add("b", prompt(num_tokens, first=200), max_tokens=1)
    engine.step()
    assert [row.request_id for row in engine.rows] == ["a"]
    assert bool(engine.orders.transfers) == leave
    engine.drain()


def test_a_hint_is_for_one_step(tmp_path):
    engine = make_engine(tmp_path, num_blocks=12, delay=lambda: HELD)
    engine.add("a", prompt(25), max_tokens=12)
    engine.step()
    request = engine.add("b", prompt(20, first=200), max_tokens=4)
    engine.recall.note_waiting(request, 0)
    engine.recall.note_allocated(request)
    assert engine.recall._waiting is None
    engine.recall.note_waiting(request, 0)
    engine.recall.plan(SchedulerOutput.make_empty())
    assert engine.recall._waiting is None


def make_recall(**settings) -> RecallScheduler:
    usual = dict(
        num_host_pages=8,
        max_slots=2,
        entries_per_block=3,
        block_size=BLOCK,
        world_size=1,
        min_spillable_len=0,
        watermark=0.0,
    )
    return RecallScheduler(**usual | settings)


def test_admission_leaves_room_to_begin(tmp_path):
    manager = make_engine(tmp_path, num_blocks=12).scheduler.kv_cache_manager
    assert manager.watermark_blocks == RESERVED_BLOCKS
    manager.watermark_blocks = 5
    make_recall().bind(manager)
    assert manager.watermark_blocks == 5


@pytest.mark.parametrize(
    "owner, name",
    [(BlockPool, "unpin_blocks"), (KVCacheManager, "block_pool")],
)
def test_another_vllm_is_refused(tmp_path, monkeypatch, owner, name):
    manager = make_engine(tmp_path, num_blocks=12).scheduler.kv_cache_manager
    where = owner if hasattr(owner, name) else manager
    monkeypatch.delattr(where, name)
    message = f"does not fit vLLM {vllm.__version__}: {owner.__name__} has no {name}"
    with pytest.raises(RuntimeError, match=message):
        make_recall().bind(manager)


def test_other_block_sizes_are_refused(tmp_path):
    manager = make_engine(tmp_path, num_blocks=12).scheduler.kv_cache_manager
    with pytest.raises(RuntimeError, match=r"blocks of 256 tokens, got .* \[4\]"):
        make_recall(block_size=256).bind(manager)


def test_index_blocks_of_one_entry_are_refused():
    with pytest.raises(ValueError, match="entries_per_block must be at least 2"):
        make_recall(entries_per_block=1)
