# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The command line on a real vLLM and a real model, at its smallest."""

import csv
import json

import pytest

from benchmarks.quality.__main__ import main

pytestmark = pytest.mark.e2e

BUDGET = 64


@pytest.fixture(scope="module")
def out(model_path, tmp_path_factory):
    """Folder of results."""
    folder = tmp_path_factory.mktemp("quality")
    main(
        [
            *("--model", model_path, "--out", str(folder), "--methods", "dense"),
            *(
                "clusterkv",
                "full",
                "ours-tail",
                "--token-budgets",
                str(BUDGET),
                "--context-lens",
                "1024",
            ),
            *("--tasks", "niah_single_1", "teacher_forcing", "--forced-tokens", "24"),
            *("--question-tokens", "12", "--max-answer-tokens", "12"),
            *("--samples", "1", "--forced-samples", "1"),
        ]
    )
    return folder


def test_rows(out):
    with (out / "quality.csv").open() as file:
        rows = {(row["task"], row["method"]): row for row in csv.DictReader(file)}
    assert float(rows["niah_single_1", "dense"]["score"]) == 100
    assert {task for task, method in rows if method == "clusterkv"} == {
        "niah_single_1",
        "teacher_forcing/kl",
        "teacher_forcing/kl_p99",
        "teacher_forcing/top_k_mass",
        "teacher_forcing/agreement",
        "teacher_forcing/nll",
        "teacher_forcing/perplexity",
        "teacher_forcing/logprob_gap",
    }
    # Near dense attention, and not it.
    kl = float(rows["teacher_forcing/kl", "clusterkv"]["score"])
    assert 0 < kl < 1
    dense = float(rows["teacher_forcing/nll", "dense"]["score"])
    sparse = float(rows["teacher_forcing/nll", "clusterkv"]["score"])
    gap = float(rows["teacher_forcing/logprob_gap", "clusterkv"]["score"])
    assert sparse - dense == pytest.approx(gap, abs=1e-3)


def test_transformers_measures_what_vllm_does(out):
    with (out / "quality.csv").open() as file:
        rows = {(row["task"], row["method"]): row for row in csv.DictReader(file)}
    tasks = {method: {t for t, m in rows if m == method} for _, method in rows}
    assert tasks["ours-tail"] == tasks["clusterkv"]
    assert tasks["full"] == tasks["dense"]
    for ours, theirs in (("dense", "full"), ("clusterkv", "ours-tail")):
        task = "teacher_forcing/nll"
        scores = [float(rows[task, method]["score"]) for method in (ours, theirs)]
        assert scores[1] == pytest.approx(scores[0], abs=0.1)
        counts = [float(rows[task, method]["attended"]) for method in (ours, theirs)]
        assert counts[1] == pytest.approx(counts[0], rel=0.01)
    assert 0 < float(rows["teacher_forcing/kl", "ours-tail"]["score"]) < 1


def test_forced_steps_were_decoded_sparsely(out):
    records = [
        json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()
    ]
    [found] = [
        record
        for record in records
        if record["task"] == "teacher_forcing" and record["method"] == "clusterkv"
    ]
    # Sinks, the budget with its last cluster, and the page being filled.
    assert BUDGET + 16 < found["attended"] < BUDGET + 16 + 256 + 64
    stats = (out / "engines" / f"clusterkv-{BUDGET}.stats.jsonl").read_text()
    contexts = [json.loads(line)["context"] for line in stats.splitlines()][-24:]
    assert contexts == [[1000 + i - 1] for i in range(1, 25)]
