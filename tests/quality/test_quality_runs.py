# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Settings, results on disk, and going on where a run was interrupted."""

import csv
import json
import math
from argparse import Namespace

import pytest

from benchmarks.quality import evaluate, plan, ruler
from benchmarks.quality.evaluate import Evaluation
from benchmarks.quality.results import (
    Results,
    key_of,
    less_dense,
    summarize,
    table,
    write_csv,
)


class Progress:
    """Counts what tqdm would show."""

    done = 0

    def update(self) -> None:
        self.done += 1

    def set_description(self, text: str) -> None:
        pass


class Engine:
    """Stands in for an engine: right when dense, else silent."""

    started: list[str] = []
    fail_after: int | None = None

    def __init__(self, name, token_budget, options) -> None:
        Engine.started.append(name)
        self.name, self.facts, self.mean_attended = name, {}, 12.5

    def generate(self, prompts, max_tokens):
        if Engine.fail_after is not None:
            if Engine.fail_after == 0:
                raise RuntimeError("interrupted")
            Engine.fail_after -= 1
        answers = {tuple(s.prompt): s.answers for s in Engine.samples}
        return [
            Engine.tokenizer.encode(" ".join(answers[tuple(prompt)]))
            if self.name == "dense"
            else []
            for prompt in prompts
        ]

    def close(self) -> None:
        pass

    kill = close


def arguments(*words: str) -> Namespace:
    args = plan.make_parser().parse_args(["--model", "m", *words])
    plan.complete(args, 8192)
    return args


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "tiny"], "--suite must be one of quick, full, got 'tiny'"),
        (["--tasks", "niah"], "--tasks must be among niah_single_1, .* got 'niah'"),
        (["--context-lens", "9000"], "--context-lens must be .* 8192, got 9000"),
        (["--token-budgets", "0"], "--token-budgets must be at least 1, got 0"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--depths", "2"], "--depths must be from 0 to 1, got 2"),
        (["--settings", "[1]"], r"--settings must be a JSON object, got \[1\]"),
        (
            ["--settings", '{"bogus": 1}'],
            "--settings for clusterkv: .* no setting 'bogus'",
        ),
        (
            ["--settings", '{"num_iters": 0}'],
            "--settings for clusterkv: .*num_iters must be .*, got 0",
        ),
        (["--methods", "clusterkv"], "--methods must be with dense for"),
        (
            ["--tasks", "teacher_forcing", "--methods", "quest"],
            "--methods must be with full for teacher_forcing of methods on transf",
        ),
        (
            ["--tasks", "teacher_forcing", "--methods", "full", "quest", "clusterkv"],
            "--methods must be with dense for teacher_forcing, got",
        ),
        (["--methods", "full"], "--methods must be with dense for long_generation"),
        (["--long-tokens", "5000"], "--long-tokens must be at most half"),
        (["--methods", "dense", "no-such"], "--methods"),
    ],
)
def test_bad_settings_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        arguments(*words)


def test_suites():
    args = arguments("--suite", "full")
    assert args.context_lens == [4096, 8192]
    assert args.tasks == list(plan.TASKS)
    args = arguments("--tasks", "ruler", "--token-budgets", "512", "128")
    assert args.tasks == list(ruler.TASKS)
    assert plan.method_budgets(args)[:3] == [
        ("dense", None),
        ("clusterkv", 128),
        ("clusterkv", 512),
    ]


def test_dense_attention_comes_first_and_has_no_budget():
    args = arguments("--methods", "quest", "clusterkv", "full", "dense")
    assert plan.method_budgets(args) == [
        ("dense", None),
        ("full", None),
        ("quest", 256),
        ("clusterkv", 256),
    ]


def test_what_methods_on_transformers_run(tmp_path, prompter, texts):
    words = ("--forced-samples", "3", "--tasks", "teacher_forcing", "long_generation")
    args = arguments(*words, "--methods", "dense", "full", "quest")
    samples = evaluate.make_samples(args, prompter, texts)
    results = Results(tmp_path, {})
    evaluation = Evaluation(args, samples, prompter, results, Progress())
    assert evaluation.count() == (3 + 3) + 3 + 3


def record(task: str, index: int, method: str, score: float) -> dict:
    budget = None if method == "dense" else 256
    return {
        "key": key_of(task, 2048, index, method, budget),
        "task": task,
        "context_len": 2048,
        "index": index,
        "method": method,
        "token_budget": budget,
        "scores": {"score": score},
        "attended": 300.0,
    }


def test_results_outlive_an_interruption(tmp_path):
    Results(tmp_path, {"seed": 1})  # that ended before its first result
    results = Results(tmp_path, {"seed": 0})
    results.add(record("vt", 0, "dense", 100))
    results.add(record("vt", 1, "dense", 50))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"key": "vt/2048/2/den')
    again = Results(tmp_path, {"seed": 0})
    assert len(again.records) == 2
    assert key_of("vt", 2048, 1, "dense", None) in again
    assert key_of("vt", 2048, 2, "dense", None) not in again
    again.add(record("vt", 2, "dense", 0))
    assert len(Results(tmp_path, {"seed": 0}).records) == 3
    with pytest.raises(ValueError, match="seed = 0, now it is 1: give another folder"):
        Results(tmp_path, {"seed": 1})


def test_summary(tmp_path):
    records = [
        record("vt", 0, "clusterkv", 0),
        record("vt", 1, "clusterkv", 100),
        record("vt", 0, "dense", 100),
        record("cwe", 0, "dense", 50),
    ]
    rows = summarize(records, "tiny")
    [row] = [row for row in rows if row["method"] == "clusterkv"]
    assert (row["score"], row["std_error"], row["samples"]) == (50, 50, 2)
    assert row["attended"] == 300
    write_csv(tmp_path / "quality.csv", rows)
    with (tmp_path / "quality.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    lines = table(rows, averaged=["vt", "cwe"]).splitlines()
    assert lines[0].split() == ["task", "context", "dense", "clusterkv@256"]
    # Of clusterkv one of the two tasks is missing.
    assert lines[-1].split()[-2:] == ["75.0", "-"]


def test_difference_from_dense_is_of_pairs():
    # vt differs by -50 and 0, cwe is not solved by dense; multikey 1 by -25 twice.
    records = [
        *(record("vt", i, "dense", score) for i, score in enumerate((100, 50, 0))),
        *(record("vt", i, "clusterkv", score) for i, score in enumerate((50, 50))),
        *(record("cwe", i, "dense", score) for i, score in enumerate((0, 30))),
        *(record("cwe", i, "clusterkv", score) for i, score in enumerate((100, 100))),
        *(record("niah_multikey_1", i, "dense", 75) for i in range(2)),
        *(record("niah_multikey_1", i, "clusterkv", 50) for i in range(2)),
        *(record("vt", i, "quest", 100) for i in range(2)),
        record("needle_grid", 0, "dense", 100),
    ]
    tasks = ["vt", "cwe", "niah_multikey_1"]
    [row] = less_dense(records, "tiny", tasks)  # quest lacks a task
    assert row["task"] == "less_dense/mean of 2"
    assert (row["method"], row["score"], row["samples"]) == ("clusterkv", -25, 4)
    assert row["std_error"] == 12.5
    assert row.keys() == summarize(records, "tiny")[0].keys()
    assert "-25.0 ±12.5" in table([*summarize(records, "tiny"), row], tasks)
    assert not less_dense(records[3:5], "tiny", tasks)


def test_perplexity_is_of_the_mean_loss():
    records = [record("teacher_forcing", index, "dense", 0) for index in range(2)]
    for loss, found in zip((1.0, 3.0), records, strict=True):
        found["scores"] = {"nll": loss}
    loss, perplexity = summarize(records, "tiny")
    assert (loss["task"], loss["score"]) == ("teacher_forcing/nll", 2)
    assert perplexity["task"] == "teacher_forcing/perplexity"
    assert perplexity["score"] == pytest.approx(math.exp(2), abs=1e-4)


def test_rerun_goes_on(tmp_path, monkeypatch, prompter, texts):
    monkeypatch.setattr(evaluate, "VllmRunner", Engine)
    Engine.started, Engine.fail_after = [], 1
    args = arguments(
        "--tasks", "niah_single_1", "vt", "--methods", "dense", "clusterkv", "--out",
        str(tmp_path), "--samples", "2", "--batch-size", "2",
    )  # fmt: skip
    samples = evaluate.make_samples(args, prompter, texts)
    Engine.samples, Engine.tokenizer = samples, prompter.tokenizer

    def run() -> tuple[Results, int]:
        results, progress = Results(tmp_path, {}), Progress()
        evaluation = Evaluation(args, samples, prompter, results, progress)
        expected = evaluation.count()
        evaluation.run()
        assert progress.done == expected
        return results, expected

    with pytest.raises(RuntimeError, match="interrupted"):
        run()
    assert len(Results(tmp_path, {}).records) == 2
    Engine.fail_after = None
    results, num_new = run()
    assert num_new == 6
    assert Engine.started == ["dense", "dense", "clusterkv"]
    rows = summarize(results.records, "m")
    assert {(row["method"], row["score"]) for row in rows} == {
        ("dense", 100),
        ("clusterkv", 0),
    }
    # Nothing is left: no engine starts.
    _, num_new = run()
    assert num_new == 0
    assert len(Engine.started) == 3
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 8
