# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""With pages on the host and a hot cache, a request gets the answer it gets without.

Below a covering budget, where the selection differs from step to step; against the same
settings with all pages resident.
"""

import pytest

from tests.support.engine import (
    assert_equal,
    attention_layers,
    clusterkv,
    engine,
    generate,
    poison,
)
from vllm_clusterkv.page_layout import COUNTERS, MASS_UNIT
from vllm_clusterkv.recall.worker import tier_of

MAX_TOKENS = 24
NUM_BLOCKS = 23  # for two of three requests of eight pages each, and what these free
SIZES = dict(max_model_len=2048, max_num_seqs=8, max_num_batched_tokens=4096)
LINE_BYTES = 8 * 2 * 64 * 4
SETTINGS = dict(token_budget=300, min_sparse_len=0)


@pytest.fixture(scope="module")
def crowd(text_ids):
    return [text_ids[2000 * i : 2000 * i + 1800 + 60 * i] for i in range(3)]


@pytest.fixture(scope="module")
def resident(model_path, crowd):
    with engine(model_path, **SIZES, **clusterkv(**SETTINGS)) as llm:
        poison(llm)
        return generate(llm, crowd, MAX_TOKENS)


@pytest.mark.parametrize("hot_cache_tokens", [256, 512])
def test_answers_are_those_of_resident_pages(
    model_path, crowd, resident, hot_cache_tokens
):
    settings = SETTINGS | {
        "host_memory_gib": 0.5,
        "hot_cache_tokens": hot_cache_tokens,
        "poison_released": True,
    }
    with engine(
        model_path, num_gpu_blocks_override=NUM_BLOCKS, **SIZES, **clusterkv(**settings)
    ) as llm:
        poison(llm)
        answers = generate(llm, crowd, MAX_TOKENS)
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        counts = scheduler.connector._decisions.books.counts()
        tier = tier_of(next(iter(attention_layers(llm))))
        counters = dict(zip(COUNTERS, tier.counters().tolist(), strict=True))
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert_equal(answers, resident)
    assert counts.total_released >= 2
    # Recomputed prompts would be dense where these are sparse.
    assert metrics["vllm:num_preemptions"] == 0
    assert free == NUM_BLOCKS - 1
    assert counters["found"] > 0
    prefix = "vllm:clusterkv_host"
    assert 0 < metrics[f"{prefix}_recalled_bytes"] <= counters["recalled"] * LINE_BYTES
    assert 0 < metrics[f"{prefix}_recalls"] <= counters["calls"]
    assert counters["nanoseconds"] > 0
    assert counters["mass"] * MASS_UNIT <= counters["mass_samples"]
