# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Settings: what is accepted, and that each rejection names setting and value."""

import dataclasses
import re

import pytest

from vllm_clusterkv.config import ClusterKVConfig


def read(**settings) -> ClusterKVConfig:
    return ClusterKVConfig.from_additional_config({"clusterkv": settings})


@pytest.mark.parametrize(
    "additional_config", [None, {}, {"clusterkv": {}}, {"another_plugin": 1}]
)
def test_defaults(additional_config):
    config = ClusterKVConfig.from_additional_config(additional_config)
    assert dataclasses.asdict(config) == {
        "token_budget": 1024,
        "tokens_per_cluster": 8,
        "num_iters": 4,
        "num_sink_tokens": 16,
        "tail_estimate": True,
        "min_sparse_len": None,
        "stats_path": None,
        "host_memory_gib": 0,
        "hot_cache_tokens": None,
        "host_watermark": 0.05,
        "poison_released": False,
    }


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("token_budget", [1, 2**30]),
        ("tokens_per_cluster", [4, 8, 16]),
        ("num_iters", [1, 100]),
        ("num_sink_tokens", [0, 128]),
        ("tail_estimate", [True, False]),
        ("min_sparse_len", [0, 2**30, None]),
        ("stats_path", ["/tmp/stats.jsonl", None]),
        ("host_memory_gib", [0, 0.5, 100]),
        ("host_watermark", [0, 0.5]),
        ("hot_cache_tokens", [0, 2**30, None]),
        ("poison_released", [True, False]),
    ],
)
def test_the_ends_of_each_range_are_accepted(name, values):
    for value in values:
        assert getattr(read(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("tokens_per_cluster", "num_clusters"), [(4, 64), (8, 32), (16, 16)]
)
def test_clusters_a_page(tokens_per_cluster, num_clusters):
    assert read(tokens_per_cluster=tokens_per_cluster).num_clusters == num_clusters


@pytest.mark.parametrize(
    ("settings", "crossover", "expected"),
    [
        ({}, 2048, 2048),
        ({}, 0, 1024 + 256 + 1),
        ({"token_budget": 1}, 0, 257),  # its one page is the tail page
        ({"token_budget": 239}, 0, 257),
        ({"token_budget": 240}, 0, 513),  # 240 of the first page, and 16 sinks
        ({"token_budget": 240, "num_sink_tokens": 0}, 0, 257),
        ({"token_budget": 4096}, 2048, 4096 + 256 + 1),
        ({"min_sparse_len": 0}, 2048, 0),
        ({"min_sparse_len": 5, "token_budget": 4096}, 2048, 5),
        ({"token_budget": 2**30}, 2048, 2**30 + 256 + 1),
    ],
)
def test_the_shortest_sparse_row(settings, crossover, expected):
    assert read(**settings).effective_min_sparse_len(crossover) == expected


@pytest.mark.parametrize(
    ("name", "expected", "values"),
    [
        (
            "token_budget",
            "an integer from 1 to 1073741824",
            [0, -1, 2**30 + 1, 1024.0, "1024", True, None, [1024]],
        ),
        ("num_iters", "an integer from 1 to 100", [0, 101, 8.0, "8", True]),
        ("num_sink_tokens", "an integer from 0 to 128", [-1, 129, 16.0, "16", False]),
        ("tokens_per_cluster", "4, 8 or 16", [0, 15, 32, 16.0, "16", True, None]),
        ("tail_estimate", "true or false", [0, 1, "true", None]),
        (
            "min_sparse_len",
            "an integer from 0 to 1073741824 or null",
            [-1, 2**30 + 1, 2048.0, "2048", True],
        ),
        ("stats_path", "a file path or null", ["", 1, True, ["a"]]),
        ("stats_path", "a file in a folder that exists", ["/tmp", "/nowhere/x"]),
    ],
)
def test_a_bad_value_is_named(name, expected, values):
    for value in values:
        message = (
            f"--additional-config: clusterkv.{name} must be {expected}, got {value!r}"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            read(**{name: value})


def test_an_unknown_setting_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="has no setting 'token_buget'") as error:
        read(token_buget=5)
    for field in dataclasses.fields(ClusterKVConfig):
        assert field.name in str(error.value)


@pytest.mark.parametrize("settings", [None, [], "token_budget=1", 1024])
def test_settings_must_be_a_mapping(settings):
    with pytest.raises(ValueError, match=r"must be a mapping of settings, got "):
        ClusterKVConfig.from_additional_config({"clusterkv": settings})


@pytest.mark.parametrize(
    "additional_config",
    [
        {"token_budget": 512},
        {"cluster_kv": {}},
        {"ClusterKV": {}, "clusterkv": {}},
        {"clusterk": {}},
        {"clusterkv ": {}},
    ],
)
def test_settings_beside_the_key_are_refused(additional_config):
    with pytest.raises(ValueError, match="must be under the key 'clusterkv'.* got the"):
        ClusterKVConfig.from_additional_config(additional_config)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ClusterKVConfig().token_budget = 5
