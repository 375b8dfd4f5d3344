# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""With a budget that covers the context, every token is as likely as with FLASH_ATTN.

The engines under test compute prompts in chunks of 600 tokens that end inside pages,
with decode rows beside them, over a KV cache whose index is NaN and whose K and V are
garbage before the first request.
"""

from dataclasses import replace

import pytest

from tests.support.engine import clusterkv
from tests.support.engine_jobs import (
    CHUNK,
    COVERING,
    DECODE_GRAPHS,
    EAGER,
    GRAPHS,
    in_own_process,
    run_rounds,
)
from tests.support.logprobs import assert_near

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]

ROUNDS = [
    "long",
    "ragged",
    "shared",
    "shared_suffixes",
    "crowd",
    "last_token",
    "full_batch",
]

MODES = {"graphs": GRAPHS, "eager": EAGER}


@pytest.fixture(scope="module")
def covering(model_path, replays):
    """Outcomes of the covering budget, by mode; engines start when asked for."""
    outcomes = {}

    def get(mode):
        if mode not in outcomes:
            alone = replace(
                replays["full_batch"],
                prompts=replays["full_batch"].prompts[::9],
                traces=replays["full_batch"].traces[::9],
                one_by_one=True,
                forget=True,
            )
            outcomes[mode] = in_own_process(
                run_rounds,
                model_path,
                replays | {"alone": alone},
                **COVERING,
                **MODES[mode],
            )
        return outcomes[mode]

    return get


@pytest.mark.parametrize(
    "name",
    [
        "long",
        "ragged",
        "shared",
        "shared_suffixes",
        "crowd",
        "last_token",
        "full_batch",
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_near_flash_attn(covering, dense, mode, name):
    assert_near(covering(mode).rounds[name], dense.rounds[name])


@pytest.mark.parametrize("mode", MODES)
def test_prefix_hits_are_whole_pages(covering, mode):
    rounds = covering(mode).rounds
    assert [a.num_cached_tokens for a in rounds["shared_suffixes"]] == [1280, 1280]
    assert [a.num_cached_tokens for a in rounds["last_token"]] == [1280]


def test_graphs_and_eager_agree(covering):
    graphs, eager = covering("graphs").rounds, covering("eager").rounds
    for name in graphs:
        assert_near(graphs[name], eager[name])


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_1_and_64_agree(covering, mode):
    rounds = covering(mode).rounds
    assert_near(rounds["alone"], rounds["full_batch"][::9])


def test_default_settings_attend_short_contexts_densely(model_path, replays, dense):
    names = ["ragged", "crowd"]
    outcome = in_own_process(
        run_rounds,
        model_path,
        {name: replays[name] for name in names},
        **CHUNK,
        **clusterkv(),
        **DECODE_GRAPHS,
    )
    for name in names:
        assert_near(outcome.rounds[name], dense.rounds[name])


def test_preempted_requests(model_path, replays, dense, text_ids):
    """Eight pages for four requests of two pages each, which all need a third.

    Then twins, preempted with 257 tokens known: the second is resumed in a decode
    graph, over a page that the first fills in the same step.
    """
    expected = dense.twins
    outcome = in_own_process(
        run_rounds,
        model_path,
        {"crowd": replays["crowd"]},
        twins=(text_ids[:240], expected[0].token_ids),
        **COVERING,
        **DECODE_GRAPHS,
        max_model_len=1024,
        num_gpu_blocks_override=9,
        async_scheduling=False,
    )
    assert outcome.num_preemptions > 0
    assert_near(outcome.rounds["crowd"], dense.rounds["crowd"])
    assert_near(outcome.twins, [expected[0], expected[0]])
