# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Teacher forcing of methods on transformers, by the command line, on a tiny model."""

import csv
import json

import pytest

from benchmarks.quality.__main__ import main
from benchmarks.quality.teacher_forcing import load


@pytest.fixture
def run(tiny_model, text_folder, tmp_path):
    """Runs methods; gives the folder of results, the same each time."""

    def run_methods(*methods):
        main(
            [
                *("--model", tiny_model, "--texts", str(text_folder)),
                *("--out", str(tmp_path / "out"), "--tasks", "teacher_forcing"),
                *("--context-lens", "720", "--token-budgets", "48", "800"),
                *("--forced-samples", "2", "--forced-tokens", "12"),
                *("--question-tokens", "5", "--top-k", "20", "--methods", *methods),
            ]
        )
        return tmp_path / "out"

    return run_methods


def records_of(out) -> list[dict]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows(run):
    out = run("window", "quest", "full")
    with (out / "quality.csv").open() as file:
        rows = {
            (row["method"], row["token_budget"], row["task"].partition("/")[2]): row
            for row in csv.DictReader(file)
        }
    measures = {"kl", "kl_p99", "top_k_mass", "agreement", "logprob_gap"}
    for method in ("window", "quest"):
        for budget in ("48", "800"):
            found = {key[2] for key in rows if key[:2] == (method, budget)}
            assert found == {*measures, "nll", "perplexity"}
        assert float(rows[method, "48", "kl"]["score"]) > 0.001
        assert float(rows[method, "800", "kl"]["score"]) == pytest.approx(0, abs=1e-6)
        assert float(rows[method, "800", "agreement"]["score"]) == 100
        nlls = [
            float(rows[key]["score"])
            for key in (("full", "", "nll"), (method, "48", "nll"))
        ]
        gap = float(rows[method, "48", "logprob_gap"]["score"])
        assert nlls[1] - nlls[0] == pytest.approx(gap, abs=2e-4)
    assert {key[2] for key in rows if key[0] == "full"} == {"nll", "perplexity"}
    # Steps see 708 to 719 tokens; sinks, the budget, and the last page from 512 on.
    assert float(rows["full", "", "nll"]["attended"]) == 713.5
    assert float(rows["window", "48", "nll"]["attended"]) == 16 + 48 + 713.5 - 512
    assert {record["steps"] for record in records_of(out)} == {12}
    # No engine was started, and vLLM's dense attention not asked for.
    assert {file.name for file in out.iterdir() if file.is_dir()} == {
        "dense-transformers"
    }
    dense = load(out / "dense-transformers" / "teacher_forcing-720-1.npz")
    assert dense.top_ids.shape == dense.top_logprobs.shape == (13, 20)
    assert (dense.top_logprobs[:, :-1] >= dense.top_logprobs[:, 1:]).all()


def test_a_method_that_comes_later_has_the_same_reference(run):
    out = run("full", "window")
    files = sorted((out / "dense-transformers").iterdir())
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]
    num_records = len(records_of(out))
    run("full", "window", "quest")
    assert [file.stat().st_mtime_ns for file in files] == before
    added = records_of(out)[num_records:]
    assert [record["method"] for record in added] == ["quest"] * 4
    files[0].unlink()
    with pytest.raises(SystemExit, match="must have full .* by oracle, which is held"):
        run("full", "oracle")
