# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Requests preempted for want of pages, and recomputed, equal those never disturbed."""

from tests.support.engine import (
    NUM_TOKENS,
    assert_equal,
    clusterkv,
    engine,
    generate,
)


def test_preemption_and_recomputation(model_path, prompts, expected):
    # Eight pages for four requests of two pages each, which all need a third.
    with engine(
        model_path,
        max_model_len=1024,
        num_gpu_blocks_override=9,
        **clusterkv(token_budget=1024),
    ) as llm:
        assert_equal(generate(llm, prompts["crowd"], NUM_TOKENS), expected["crowd"])
        preemptions = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        assert preemptions["vllm:num_preemptions"] > 0
