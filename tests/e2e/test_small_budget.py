# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""With a budget far below the context: finite, deterministic, and facts are found."""

import json
import math

import pytest

from tests.support.engine import clusterkv, engine, generate
from tests.support.prompts import needle_prompt

BUDGET = 128
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def stats_path(tmp_path_factory):
    return tmp_path_factory.mktemp("stats") / "decode.jsonl"


@pytest.fixture(scope="module")
def llm(model_path, stats_path):
    with engine(
        model_path,
        dtype="bfloat16",
        **clusterkv(token_budget=BUDGET, min_sparse_len=0, stats_path=str(stats_path)),
    ) as llm:
        yield llm


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_hidden_fact_is_found(llm, tokenizer, text_ids, position):
    [answer] = generate(llm, [needle_prompt(tokenizer, text_ids, position)], NUM_TOKENS)
    assert "7421" in answer.text


def test_finite_and_deterministic(llm, text_ids):
    prompts = [text_ids[:3000], text_ids[4000:5500], text_ids[:300]]
    runs = []
    for _ in range(2):
        # Neither may hit pages of other requests: other chunks, other rounding.
        assert llm.reset_prefix_cache()
        runs.append(generate(llm, prompts, NUM_TOKENS))
    first, second = runs
    assert first == second
    assert all(math.isfinite(p) for answer in first for p in answer.logprobs)


def test_decode_attends_to_the_budget(llm, text_ids, stats_path):
    prompt = text_ids[6000:8500]
    start = len(stats_path.read_text().splitlines())
    generate(llm, [prompt], NUM_TOKENS)
    steps = [json.loads(line) for line in stats_path.read_text().splitlines()[start:]]
    # The first token comes of the prefill; each other is a decode step.
    assert [step["context"] for step in steps] == [
        [len(prompt) + i] for i in range(1, NUM_TOKENS)
    ]
    for step in steps:
        [context], [attended] = step["context"], step["attended"]
        always = 16 + (context - 1) % 256 + 1  # sinks and tail page
        # A selection ends with the cluster that reaches the budget.
        assert always + BUDGET <= attended < always + BUDGET + 64
