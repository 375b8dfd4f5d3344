# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The hot cache's simulation: what it keeps, and which rows a step asks for."""

import csv

import pytest
import torch

from benchmarks.quality import fidelity, hit_rate
from benchmarks.quality.methods import make_method


def hits(num_lines, steps):
    cache = hit_rate.LineCache(num_lines)
    for lines in steps:
        cache.step(lines, counts=True)
    return cache.num_hits, cache.num_misses


def test_lines_used_last_are_kept():
    assert hits(2, [[1], [2], [1], [3], [1], [2]]) == (2, 4)
    assert hits(3, [[1], [2], [1], [3], [1], [2]]) == (3, 3)


def test_a_step_does_not_evict_its_own_lines():
    # 1 stays in the cache of two, though four are asked for; one of the others fits.
    assert hits(2, [[1], [1, 2, 3, 4], [1, 2]]) == (3, 4)
    assert hits(2, [[1, 2, 3]] * 3) == (4, 5)
    assert hits(0, [[1], [1]]) == (0, 2)


def test_steps_that_do_not_count():
    cache = hit_rate.LineCache(1)
    cache.step([1], counts=False)
    cache.step([1], counts=True)
    assert (cache.num_hits, cache.num_misses) == (1, 0)


def test_rows_are_those_of_whole_clusters_in_sorted_pages():
    generator = torch.Generator().manual_seed(0)
    contexts = [1100, 1101]
    queries = 3 * torch.randn(2, 6, 64, generator=generator)
    keys, values = torch.randn(2, 2, 1101, 64, generator=generator)
    layer = fidelity.Layer(queries, keys, values, 0.125)
    method = make_method("ours-tail")
    index = method.index(layer.scale)
    index.update(keys, values)
    for heads in hit_rate.selections(layer, method, 128, contexts):
        for head, rows in enumerate(heads):
            assert rows.min() >= 256 and rows.max() < 1024
            assert len(rows.unique()) == len(rows)
            labels = index.labels[head].view(-1, 256).sort(1).values.flatten()
            clusters = labels[rows].unique()
            assert len(rows) == torch.isin(labels, clusters).sum()


def test_a_run_writes_its_table(tiny_model, text_folder, tmp_path, capsys):
    arguments = ["--model", tiny_model, "--out", str(tmp_path)]
    arguments += [
        "--texts",
        str(text_folder),
        "--context-lens",
        "800",
        "--token-budgets",
        "64",
        "--steps",
        "20",
    ]
    hit_rate.main([*arguments, "--line-rows", "8", "--hot-budgets", "1", "12"])
    with (tmp_path / "hit_rate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["mean", "mean", "0", "0", "1", "1"]
    assert {row["hot_cache_tokens"] for row in rows} == {"64", "768"}
    # All rows that may be asked for fit the larger.
    small, large = (float(row["hit_rate"]) for row in rows[:2])
    assert 0 <= small < large <= 1
    assert float(rows[0]["rows_a_row"]) >= 1
    assert "hit rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "--steps must be at least 2, got 1"),
        (["--warm-up", "128"], "--warm-up must be less than --steps"),
        (["--line-rows", "24"], "--line-rows must divide 256"),
        (["--every-nth-layer", "0"], "--every-nth-layer must be at least 1"),
    ],
)
def test_bad_settings_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        hit_rate.main(["--model", "m", "--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
