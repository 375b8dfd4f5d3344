# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Requests preempted for want of pages, and recomputed, equal those never disturbed.

At a covering budget: below it, generated tokens are recomputed by dense prefill, where
sparse decode had made them.
"""

from tests.support.engine import (
    NUM_TOKENS,
    as_generated,
    assert_equal,
    clusterkv,
    engine,
    generate,
    poison,
    sampling,
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

    Both are preempted with 257 tokens known. Resumed in one step, the first computes
    its page again; the second hits it in the prefix cache at once and has one token
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


def run_twins(core, prompt):
    """Greedy answers of two equal requests, preempted when 257 tokens are known."""
    for name in "AB":
        core.add_request(name, {"prompt_token_ids": prompt}, sampling(40))
    finished, known, preempted = {}, {}, False
    while core.has_unfinished_requests():
        for output in core.step():
            num_generated = len(output.outputs[0].token_ids)
            known[output.request_id] = len(prompt) + num_generated
            if output.finished:
                finished[output.request_id] = as_generated(output)
        if not preempted and set(known.values()) == {257}:
            preempted = True
            assert core.reset_prefix_cache(reset_running_requests=True)
    assert preempted
    return [finished["A"], finished["B"]]
