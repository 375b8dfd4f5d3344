# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Pages that move to pinned host memory while their requests decode change no answer.

Asynchronous scheduling, as by default; released blocks are overwritten.
"""

import pytest

from tests.support.logprobs import assert_near

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]

MODES = ["graphs", "eager"]


@pytest.mark.parametrize("name", ["moving", "moving again"])
@pytest.mark.parametrize("mode", MODES)
def test_near_flash_attn(outcome, mode, name):
    assert_near(
        outcome(f"host tier, {mode}").rounds[name], outcome("dense").rounds["moving"]
    )


@pytest.mark.parametrize("mode", MODES)
def test_pages_moved_and_nothing_is_left(outcome, mode):
    result = outcome(f"host tier, {mode}")
    assert result.num_released >= 4
    assert not any(result.held.values())


def test_lines_are_recalled(outcome):
    """All are wanted at each step, of which one hot block holds a part."""
    _, recalled, left, calls, nanoseconds, _, _ = outcome("host tier, graphs").num_lines
    assert recalled > 0 and left > 0
    assert 1000 < nanoseconds / calls < 1e6
    assert not any(outcome("host tier, eager").num_lines)


def test_graphs_are_replayed(outcome):
    assert outcome("host tier, graphs").full_replays["moving"]
    assert not any(outcome("host tier, eager").full_replays.values())
