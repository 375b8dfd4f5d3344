# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Tasks: of the asked length, the same for a seed, with their answers in the prompt."""

import json
import re

import pytest

from benchmarks.quality import longbench, needle_grid, ruler, teacher_forcing
from benchmarks.quality.samples import Message
from benchmarks.quality.texts import load_texts
from benchmarks.quality.words import names

LENGTHS = [2048, 4500]


@pytest.mark.parametrize("context_len", LENGTHS)
@pytest.mark.parametrize("task", ruler.TASKS)
def test_ruler_sample(task, context_len, prompter, texts):
    sample = ruler.make_sample(task, prompter, texts, context_len, 0)
    room = context_len - sample.max_tokens
    assert 0.95 * room <= len(sample.prompt) <= room
    prompt = prompter.decode(sample.prompt)
    assert all(answer in prompt for answer in sample.answers)
    num_answers = {"vt": 5, "cwe": 10, "fwe": 3}.get(task)
    many = ("niah_multivalue", "niah_multiquery")
    assert len(sample.answers) == (num_answers or (4 if task in many else 1))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_ruler_samples_follow_the_seed(task, prompter, texts):
    def make(index: int, seed: int):
        return ruler.make_sample(task, prompter, texts, 2048, index, seed)

    assert make(0, 0) == make(0, 0)
    assert len({tuple(make(i, s).answers) for i, s in ((0, 0), (1, 0), (0, 1))}) == 3


def test_a_word_of_many_tokens_is_found_quickly(prompter):
    words = [*["word "] * 3000, "9" * 800 + " ", *["word "] * 3000]
    tried = []

    def build(amount: int) -> Message:
        tried.append(amount)
        return Message("".join(words[:amount]), "", [])

    prompt, _ = prompter.fit(build, 3400, "task")
    assert 3000 <= len(prompt) <= 3400 - 300
    assert len(tried) < 30


def test_needles_have_different_keys_of_which_one_is_asked(prompter, texts):
    sample = ruler.make_sample("niah_multikey_2", prompter, texts, 2048, 0)
    prompt = prompter.decode(sample.prompt)
    needles = re.findall(r"magic numbers for ([a-z-]+) is: (\d+)\.", prompt)
    [asked] = re.findall(r"special magic number for ([a-z-]+) mentioned", prompt)[:1]
    assert len(needles) > 30
    assert len({key for key, _ in needles}) == len(needles)
    assert dict(needles)[asked] == sample.answers[0]


def test_variables_are_a_chain(prompter, texts):
    sample = ruler.make_sample("vt", prompter, texts, 2048, 0)
    # Behind the example.
    task = prompter.decode(sample.prompt).rpartition("Memorize and track")[2]
    first, *others = sample.answers
    assert re.search(rf"VAR {first} = \d{{5}}", task)
    places = [task.index(f"VAR {first} = ")]
    for a, b in zip(sample.answers, others, strict=False):
        places.append(task.index(f"VAR {b} = VAR {a}"))
    assert places == sorted(places)


def test_common_words_are_the_most_common(prompter, texts):
    sample = ruler.make_sample("cwe", prompter, texts, 4500, 0)
    task = prompter.decode(sample.prompt).rpartition("Below is a numbered list")[2]
    task = task.partition("Question:")[0]
    words = re.findall(r"\d+\. ([a-z]+)", task)
    assert {words.count(word) for word in sample.answers} == {30}
    assert {words.count(word) for word in set(words) - set(sample.answers)} == {3}


def test_frequent_words_are_the_most_frequent(prompter, texts):
    sample = ruler.make_sample("fwe", prompter, texts, 4500, 0)
    words = prompter.decode(sample.prompt).partition("Question:")[0].split()
    coded = {word: words.count(word) for word in words if len(word) == 6}
    best = sorted(coded, key=coded.__getitem__, reverse=True)[:3]
    assert best == sample.answers


def test_too_short_a_context_is_named(prompter, texts):
    with pytest.raises(ValueError, match=r"--context-lens: cwe .* at least \d+ tokens"):
        ruler.make_sample("cwe", prompter, texts, 300, 0)


def test_needle_is_at_its_depth(prompter, texts):
    depths = [0.0, 0.3, 0.8, 1.0]
    samples = needle_grid.make_samples(prompter, texts, 4096, depths, 2)
    assert len({sample.index for sample in samples}) == len(samples) == 8
    for sample in samples:
        room = 4096 - sample.max_tokens
        assert 0.95 * room <= len(sample.prompt) <= room
        prompt = prompter.decode(sample.prompt)
        place = prompt.index(sample.answers[0]) / len(prompt)
        # At the end of the sentence or line before it; the question comes on top.
        assert abs(place - sample.labels["depth"]) < 0.04


def test_heat_map_of_each_method(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        {
            "task": "needle_grid",
            "context_len": length,
            "labels": {"depth": depth},
            "method": method,
            "token_budget": budget,
            "scores": {"score": 50.0},
        }
        for length in (1024, 2048)
        for depth in (0.0, 1.0)
        for method, budget in (("dense", None), ("clusterkv", 256))
    ]
    files = needle_grid.draw(records, tmp_path)
    assert [file.name for file in files] == [
        "needle_grid-dense.png",
        "needle_grid-clusterkv-256.png",
    ]
    assert all(file.stat().st_size for file in files)


def test_forced_text_goes_on_where_the_prompt_ends(prompter, texts):
    sample = teacher_forcing.make_sample(
        "teacher_forcing", prompter, texts, 1000, 64, 0
    )
    assert len(sample.prompt) + len(sample.forced) == 1000
    assert len(sample.forced) == sample.num_tokens == 65
    joined = prompter.decode(sample.prompt + sample.forced)
    assert joined in texts.text


def test_texts_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="--texts must be a folder"):
        load_texts(tmp_path / "none")
    (tmp_path / "a.txt").write_text("few words")
    with pytest.raises(ValueError, match="--texts must hold at least 2000 characters"):
        load_texts(tmp_path)
    (tmp_path / "b.txt").write_text("many words. " * 500)
    (tmp_path / "c.bin").write_text("left out")
    found = load_texts(tmp_path)
    assert [source["file"] for source in found.sources] == ["a.txt", "b.txt"]
    assert all(len(source["sha256"]) == 64 for source in found.sources)
    # Round the end.
    assert len(found.excerpt(len(found.pieces) - 1, 5000)) == 5000


def test_names_are_different_past_the_pairs():
    import random

    drawn = names(random.Random(0))
    found = [next(drawn) for _ in range(12_000)]
    assert len(set(found)) == len(found)


def test_longbench(tmp_path, prompter, capsys):
    with pytest.raises(
        ValueError, match=r"--longbench must be a folder .*qasper.jsonl"
    ):
        longbench.make_samples(tmp_path, prompter, 2048, 2)
    item = {"context": "word " * 5000, "input": "Who?", "answers": ["Ada"]}
    (tmp_path / "hotpotqa.jsonl").write_text(f"{json.dumps(item)}\n" * 3)
    samples = longbench.make_samples(tmp_path, prompter, 2048, 2)
    assert "no lcc.jsonl" in capsys.readouterr().out
    assert [sample.task for sample in samples] == ["longbench_hotpotqa"] * 2
    for sample in samples:
        assert 0.95 * 2016 <= len(sample.prompt) <= 2016
        prompt = prompter.decode(sample.prompt)
        # The middle is left out.
        assert "Answer the question based" in prompt
        assert "Question: Who?" in prompt
