# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""With a budget that covers the context, tokens equal those of vLLM's own backend.

Once with every row sparse and everything selected, once by default, where such rows
are attended to densely.

The engine under test schedules as unlike the dense one as it can: chunks of 600
tokens that end inside pages, decode rows beside prefill rows, and a KV cache whose
every byte, index and padding included, is NaN before the first request.
"""

import pytest

from tests.support.engine import (
    NUM_TOKENS,
    as_generated,
    assert_equal,
    attention_layers,
    clusterkv,
    engine,
    generate,
    poison,
    sampling,
)
from vllm_clusterkv import cpu_backend


@pytest.fixture(
    scope="module",
    params=[{"min_sparse_len": 0}, {}, {"min_sparse_len": 700}],
    ids=["sparse", "dense", "mixed"],
)
def llm(model_path, expected, request):
    with engine(
        model_path,
        max_num_batched_tokens=600,
        **clusterkv(token_budget=4096, **request.param),
    ) as llm:
        poison(llm)
        yield llm


def test_long_prompt_in_chunks(llm, prompts, expected):
    assert_equal(generate(llm, prompts["long"], NUM_TOKENS), expected["long"])


def test_ragged_batch_with_pages_completed_while_decoding(llm, prompts, expected):
    assert_equal(generate(llm, prompts["ragged"], NUM_TOKENS), expected["ragged"])


def test_prefix_hit_reuses_the_index(llm, prompts, expected, monkeypatch):
    cold = generate(llm, prompts["shared"], NUM_TOKENS)
    assert_equal(cold, expected["shared"])

    indexed = set()
    index = cpu_backend.index_completed_pages

    def record(pages, completed, config):
        indexed.update(completed.block_ids.tolist())
        index(pages, completed, config)

    monkeypatch.setattr(cpu_backend, "index_completed_pages", record)
    kv_cache = next(iter(attention_layers(llm).values())).kv_cache
    before = kv_cache.clone()
    hits = generate(llm, prompts["shared_suffixes"], NUM_TOKENS)
    assert_equal(hits, expected["shared_suffixes"])
    assert [hit.num_cached_tokens for hit in hits] == [1280, 1280]
    # Neither request fills a page of its own (1300 + 100 + 20 tokens stay below 1536),
    # so nothing is indexed, and no page but the two tail pages changes a byte.
    assert not indexed
    changed = (before != kv_cache) & ~(before.isnan() & kv_cache.isnan())
    assert changed.flatten(1).any(1).sum() == 2


def test_aborted_request_between_others(llm, prompts, expected):
    core = llm.llm_engine
    names = [f"abort-{i}" for i in range(len(prompts["crowd"]))]
    for name, prompt in zip(names, prompts["crowd"], strict=True):
        core.add_request(name, {"prompt_token_ids": prompt}, sampling(NUM_TOKENS))
    finished, num_steps = {}, 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                finished[output.request_id] = as_generated(output)
        num_steps += 1
        if num_steps == 8:
            core.abort_request([names[1]])
    survivors = [0, 2, 3]
    assert_equal(
        [finished[names[i]] for i in survivors],
        [expected["crowd"][i] for i in survivors],
    )
