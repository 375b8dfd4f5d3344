# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Which process writes the statistics."""

from types import SimpleNamespace

import pytest

from vllm_clusterkv import observe


@pytest.mark.parametrize(
    "rank, data_parallel_index, writes",
    [(0, 0, True), (1, 0, False), (0, 1, False), (1, 1, False)],
)
def test_one_process_writes_statistics(
    tmp_path, monkeypatch, rank, data_parallel_index, writes
):
    monkeypatch.setattr(observe, "observers", [])
    process = SimpleNamespace(rank=rank, data_parallel_index=data_parallel_index)
    path = tmp_path / "stats.jsonl"
    observe.set_stats_file(str(path), ["layer"], process)
    assert (len(observe.observers) == 1) == path.exists() == writes
    observe.set_stats_file(None, ["layer"], process)
    assert observe.observers == []
