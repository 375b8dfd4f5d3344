# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Random lives of vLLM's scheduler with the host tier: after every step the books add
up, and every page of every row is found, and is the right one."""

import random

import pytest

from tests.support.recall_engine import VOCAB, Engine, make_engine
from vllm_clusterkv.recall.messages import ClearSlot, Release, SetTail

NUM_BLOCKS = 30
ROOMY = {"num_host_pages": 40, "max_slots": 4, "watermark": 0.1}
TIGHT = {"num_host_pages": 9, "max_slots": 2, "watermark": 0.0}
HOT = ROOMY | {"num_hot_blocks": 3}


def live(engine: Engine, rng: random.Random, num_steps: int) -> None:
    """Arrivals with shared prefixes, aborts, resets with all requests preempted."""
    stems = [[rng.randint(1, VOCAB) for _ in range(60)] for _ in range(3)]
    num_added = 0
    for _ in range(num_steps):
        if rng.random() < 0.15 and len(engine.scheduler.requests) < 12:
            stem = rng.choice(stems)[: rng.randint(0, 60)]
            own = [rng.randint(1, VOCAB) for _ in range(rng.randint(1, 20))]
            if rng.random() < 0.2:  # The same again, perhaps in the same step.
                own = []
            prompt = stem + own or [1]
            engine.add(
                f"r{num_added}", prompt, rng.randint(1, 32), priority=rng.randint(0, 2)
            )
            num_added += 1
        if rng.random() < 0.01 and engine.scheduler.requests:
            engine.abort(rng.choice(sorted(engine.scheduler.requests)))
        if rng.random() < 0.003:
            assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            engine.check_books()
        engine.step()


def make_random_engine(folder, rng, asynchronous, policy="fcfs", **settings) -> Engine:
    return make_engine(
        folder,
        num_blocks=NUM_BLOCKS,
        delay=lambda: rng.choice([1, 1, 2, 5]),
        world_size=2,
        asynchronous=asynchronous,
        policy=policy,
        max_num_batched_tokens=40,
        max_model_len=4 * (NUM_BLOCKS - 2),
        min_spillable_len=12,
        max_transfers=5,
        **settings,
    )


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize(
    "settings", [ROOMY, TIGHT, HOT], ids=["roomy", "tight", "hot blocks"]
)
def test_random_life(tmp_path, asynchronous, policy, settings):
    rng = random.Random(0)
    engine = make_random_engine(tmp_path, rng, asynchronous, policy, **settings)
    live(engine, rng, num_steps=2000)
    engine.drain()

    counts = engine.books.counts()
    # What was to be tested did happen.
    assert counts.total_released > 100
    assert counts.total_late > 10
    assert engine.num_preemptions > (10 if settings is TIGHT else 0)
    assert all(worker.num_recalled > 1000 for worker in engine.workers)
    # And nothing is left of it.
    assert counts.num_copying == counts.num_clean == counts.num_released == 0
    assert counts.num_slots == 0
    assert counts.num_free_host_pages == settings["num_host_pages"]
    assert not engine.recall._requests and not engine.recall._fruitless
    assert engine.pool.get_num_free_blocks() == NUM_BLOCKS - 1
    assert engine.scheduler.reset_prefix_cache()


@pytest.mark.parametrize("kind", [Release, SetTail, ClearSlot])
def test_control_a_worker_that_misses_commands_is_found_out(tmp_path, kind):
    rng = random.Random(0)
    engine = make_random_engine(tmp_path, rng, asynchronous=False, **ROOMY)
    engine.dropped = (kind,)
    with pytest.raises(AssertionError, match="wrong|slot"):
        live(engine, rng, num_steps=1500)
