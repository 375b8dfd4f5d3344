# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""How large a request's hot cache is, and what is refused."""

import pytest

from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.recall.connector import _num_hot_blocks


@pytest.mark.parametrize(
    "budget, max_blocks, num_blocks, expected",
    [
        (1024, 130, 1627, 8),
        (1000, 130, 1627, 8),
        (16384, 128, 1627, 32),  # a quarter of a request
        (1024, 130, 64, 4),  # a sixteenth of the KV cache
        (1024, 3, 64, 0),
    ],
)
def test_by_default(budget, max_blocks, num_blocks, expected):
    config = ClusterKVConfig(token_budget=budget)
    assert _num_hot_blocks(config, max_blocks, num_blocks) == expected


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 1), (1024, 4)])
def test_as_set(tokens, expected):
    config = ClusterKVConfig(hot_cache_tokens=tokens)
    assert _num_hot_blocks(config, max_blocks=8, num_blocks=64) == expected


@pytest.mark.parametrize("max_blocks, num_blocks", [(8, 64), (130, 16)])
def test_more_than_pays_is_refused(max_blocks, num_blocks):
    config = ClusterKVConfig(hot_cache_tokens=1025)
    with pytest.raises(ValueError, match="hot_cache_tokens must be at most 1024 with"):
        _num_hot_blocks(config, max_blocks, num_blocks)
