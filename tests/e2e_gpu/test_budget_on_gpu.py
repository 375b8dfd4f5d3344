# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""With a budget far below the context: finite, repeatable, and facts are found.

Nothing but pages that are indexed in time gives this: the index of a page is NaN
until then.
"""

import math
from dataclasses import replace

import pytest

from tests.support.engine_jobs import (
    DECODE_GRAPHS,
    EAGER,
    SMALL_BUDGET,
    Round,
    in_own_process,
    run_rounds,
)
from tests.support.logprobs import assert_near
from tests.support.prompts import needle_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]

POSITIONS = [0.1, 0.5, 0.9]


@pytest.fixture(scope="module")
def rounds(replays, tokenizer, text_ids):
    needles = [needle_prompt(tokenizer, text_ids, position) for position in POSITIONS]
    named = {name: replays[name] for name in ("long", "full_batch")}
    again = {f"{name} again": replace(named[name], forget=True) for name in named}
    return named | again | {"needles": Round(needles, 16)}


@pytest.fixture(scope="module")
def small(model_path, rounds):
    return in_own_process(
        run_rounds, model_path, rounds, **SMALL_BUDGET, **DECODE_GRAPHS
    )


def test_hidden_facts_are_found(small):
    for answer in small.rounds["needles"]:
        assert "7421" in answer.text


@pytest.mark.parametrize("name", ["long", "full_batch"])
def test_finite_and_repeatable(small, name):
    first, second = small.rounds[name], small.rounds[f"{name} again"]
    assert first == [replace(a, num_cached_tokens=0) for a in second]
    assert all(math.isfinite(p) for answer in first for p in answer.logprobs)


def test_graphs_and_eager_agree(model_path, rounds, small):
    names = ["long", "full_batch"]
    eager = in_own_process(
        run_rounds,
        model_path,
        {name: rounds[name] for name in names},
        **SMALL_BUDGET,
        **EAGER,
    )
    for name in names:
        assert_near(small.rounds[name], eager.rounds[name])
