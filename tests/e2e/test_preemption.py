# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Requests preempted for want of pages, and recomputed, equal those never disturbed.

At a covering budget: below it, generated tokens are recomputed by dense prefill, where
sparse decode had made them.
"""

from tests.support.engine import (
    NUM_TOKENS,
    assert_equal,
    clusterkv,
    engine,
    generate,
    poison,
    run_twins,
)


def test_preemption_and_recomputation(model_path, prompts, expected):
    # Eight pages for four requests of two pages each, which all need a third.
    with engine(
        model_path,
        max_model_len=1024,
        num_gpu_blocks_override=9,
        **clusterkv(token_budget=1024, min_sparse_len=0),
    ) as llm:
        assert_equal(generate(llm, prompts["crowd"], NUM_TOKENS), expected["crowd"])
        preemptions = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        assert preemptions["vllm:num_preemptions"] > 0


def test_twins_resumed_in_the_step_that_fills_their_page(model_path, text_ids):
    """One of two equal requests decodes over a page that the other computes.

    Both are preempted with 257 tokens known. The second is resumed with one token
    left, which makes it a decode row.
    """
    budgets = {"dense": {}, "sparse": clusterkv(token_budget=1024, min_sparse_len=0)}
    answers = {}
    for name, backend in budgets.items():
        with engine(
            model_path, max_model_len=1024, max_num_batched_tokens=1024, **backend
        ) as llm:
            if backend:
                poison(llm)
            answers[name] = run_twins(llm.llm_engine, text_ids[:240])
    assert_equal(answers["sparse"], answers["dense"])
