# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""With a budget that covers the context, every token is as likely as with FLASH_ATTN.

The engines under test compute prompts in chunks of 600 tokens that end inside pages,
with decode rows beside them, over a KV cache whose index is NaN and whose K and V are
garbage before the first request.
"""

from dataclasses import replace
from itertools import chain

import pytest

from tests.support.engine_jobs import CAPTURE_SIZES
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

MODES = ["graphs", "eager"]


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("mode", MODES)
def test_near_flash_attn(outcome, mode, name):
    assert_near(outcome(mode).rounds[name], outcome("dense").rounds[name])


@pytest.mark.parametrize("mode", MODES)
def test_prefix_hits_are_whole_pages(outcome, mode):
    rounds = outcome(mode).rounds
    assert [a.num_cached_tokens for a in rounds["shared_suffixes"]] == [1280, 1280]
    assert [a.num_cached_tokens for a in rounds["last_token"]] == [1280]


def test_graphs_and_eager_agree(outcome):
    graphs, eager = outcome("graphs").rounds, outcome("eager").rounds
    for name in graphs:
        assert_near(graphs[name], eager[name])


def test_graphs_are_replayed(outcome):
    replays = outcome("graphs").full_replays
    # Each graph, and the largest without padding.
    used = {
        min(size for size in CAPTURE_SIZES if size >= num_rows)
        for num_rows in chain.from_iterable(replays.values())
    }
    assert used == set(CAPTURE_SIZES)
    assert 64 in replays["full_batch"]
    # Its last token of prompt, and the 19 that decode.
    assert replays["last_token"] == [1] * 20
    assert not any(outcome("eager").full_replays.values())


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_1_and_64_agree(outcome, mode):
    rounds = outcome(mode).rounds
    assert_near(rounds["alone"], rounds["full_batch"][::16])


@pytest.mark.parametrize("name", ["ragged", "crowd"])
def test_default_settings_attend_short_contexts_densely(outcome, name):
    assert_near(outcome("default").rounds[name], outcome("dense").rounds[name])


def test_preempted_requests(outcome):
    """Eight pages for four requests of two pages each, which all need a third."""
    few_pages, dense = outcome("few pages"), outcome("dense")
    assert few_pages.num_preemptions > 0
    assert_near(few_pages.rounds["crowd"], dense.rounds["crowd"])


def test_twins_resumed_in_the_step_that_fills_their_page(outcome):
    """The second has one token left, over a page that the first computes again.

    The step is eager, since the first has 257 tokens to compute.
    """
    [expected] = outcome("dense").rounds["page_end"]
    assert_near(outcome("few pages").rounds["twins"], [expected, expected])


def test_page_shared_by_the_graph_that_fills_it(outcome):
    few_pages = outcome("few pages")
    first, second = few_pages.rounds["follower"]
    [expected] = outcome("dense").rounds["page_end"]
    assert_near([first], [expected])
    # The second begins behind the 17th token that the first generates.
    assert second.num_cached_tokens == 256
    rest = replace(
        expected,
        token_ids=expected.token_ids[17:],
        logprobs=expected.logprobs[17:],
    )
    assert_near([second], [rest])
    # All steps but those with a prompt of several tokens: the first alone until its
    # page lacks one token, then both from the step on which fills it.
    assert few_pages.full_replays["follower"] == [1] * 15 + [2] * 23 + [1]
