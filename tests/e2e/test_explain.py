# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""``explain`` against what the layers were given and gave back."""

import json
from collections import defaultdict
from contextlib import nullcontext
from statistics import mean

import pytest
import torch

from tests.support.engine import attention_layers
from vllm_clusterkv import cpu_backend, observe
from vllm_clusterkv import explain as cli
from vllm_clusterkv.backend import DecodeMetadata
from vllm_clusterkv.explain import explain_prompt, load
from vllm_clusterkv.page_layout import BLOCK_SIZE

BUDGET = 256
MAX_MODEL_LEN = 2048
NUM_STEPS = 2
NEEDLE_AT = 700


@pytest.fixture(scope="module")
def llm(model_path):
    with load(model_path, max_model_len=MAX_MODEL_LEN, token_budget=BUDGET) as llm:
        yield llm


@pytest.fixture(scope="module")
def needle(tokenizer) -> list[int]:
    return tokenizer.encode("\n\nThe secret number of the lighthouse is 7421.\n\n")


@pytest.fixture(scope="module")
def prompt(tokenizer, text_ids, needle) -> list[int]:
    question = tokenizer.encode(
        "\n\nQuestion: What is the secret number of the lighthouse?\n"
        "Answer: The secret number of the lighthouse is"
    )
    return text_ids[:NEEDLE_AT] + needle + text_ids[NEEDLE_AT:1400] + question


class Recorder:
    """What the attention layers were given and gave back, layer by layer."""

    def __init__(self) -> None:
        self.written = defaultdict(list)  # [num_tokens, num_kv_heads, 2 * head_size]
        self.cached = {}  # [num_kv_heads, context, 2 * head_size], last decode step
        self.query = {}  # [num_heads, head_size], last decode step
        self.output = {}  # As query.

    def attach(self, monkeypatch, llm) -> None:
        for name, layer in attention_layers(llm).items():
            self._attach_layer(monkeypatch, name, layer.impl)
        monkeypatch.setattr(observe, "observers", [self._observe])

    def _attach_layer(self, monkeypatch, name, impl) -> None:
        update, forward = impl.do_kv_cache_update, impl.forward

        def record_update(layer, key, value, kv_cache, slot_mapping):
            self.written[name].append(torch.cat([key, value], -1)[: len(slot_mapping)])
            update(layer, key, value, kv_cache, slot_mapping)

        def record_forward(layer, query, *args, **kwargs):
            output = forward(layer, query, *args, **kwargs)
            self.query[name], self.output[name] = query[0].clone(), output[0].clone()
            return output

        monkeypatch.setattr(impl, "do_kv_cache_update", record_update)
        monkeypatch.setattr(impl, "forward", record_forward)

    def _observe(self, step: observe.DecodeStep) -> None:
        rows = step.kv_cache[step.block_table[0].long()].transpose(0, 1).flatten(1, 2)
        self.cached[step.layer_name] = rows[:, : int(step.seq_lens[0])]


@pytest.fixture(scope="module")
def recorded_and_explained(llm, prompt):
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder.attach(monkeypatch, llm)
        explanation = explain_prompt(llm, prompt, num_steps=NUM_STEPS)
    return recorder, explanation


@pytest.fixture(scope="module")
def recorder(recorded_and_explained) -> Recorder:
    return recorded_and_explained[0]


@pytest.fixture(scope="module")
def explanation(recorded_and_explained):
    return recorded_and_explained[1]


def last_step(explanation, layer_name):
    """The measurements of a layer's KV heads in the last decode step."""
    layer = int(layer_name.split(".")[2])
    return [
        head
        for head in explanation.heads
        if (head.step, head.layer) == (NUM_STEPS - 1, layer)
    ]


def test_every_step_layer_and_head_is_measured(llm, prompt, explanation):
    num_layers = len(attention_layers(llm))
    where = [(head.step, head.layer, head.kv_head) for head in explanation.heads]
    expected = [
        (step, layer, kv_head)
        for step in range(NUM_STEPS)
        for layer in range(num_layers)
        for kv_head in range(3)
    ]
    assert where == expected
    assert {head.context - head.step for head in explanation.heads} == {len(prompt) + 1}
    assert len(explanation.tokens) == len(prompt) + NUM_STEPS + 1


def test_clusters_partition_the_context(prompt, explanation):
    clustered = list(range(16, len(prompt) // BLOCK_SIZE * BLOCK_SIZE))
    for head in explanation.heads:
        tokens = [i for cluster in head.clusters for i in cluster.positions]
        assert sorted(tokens) == clustered
        always = head.context - len(clustered)
        selected = sum(len(c.positions) for c in head.clusters if c.selected)
        assert head.attended == always + selected
        assert BUDGET <= selected < len(clustered)
        assert sum(c.weight for c in head.clusters) == pytest.approx(1, abs=1e-4)


def test_masses_add_up(explanation):
    for head in explanation.heads:
        captured, always = mean(head.captured), mean(head.always)
        selected = sum(c.mass for c in head.clusters if c.selected)
        left_out = sum(c.mass for c in head.clusters if not c.selected)
        assert captured == pytest.approx(always + selected, abs=1e-4)
        assert always + selected + left_out == pytest.approx(1, abs=1e-4)
        assert captured <= head.best + 1e-4 <= 1 + 2e-4
        assert all(0 <= share <= 1 for share in head.estimated)
        for cluster in head.clusters:
            of_tokens = float(head.token_mass[cluster.positions].sum())
            assert cluster.mass == pytest.approx(of_tokens, abs=1e-4)


def test_positions_are_those_the_rows_were_written_to(recorder, explanation):
    for name, cached in recorder.cached.items():
        written = torch.cat(recorder.written[name])
        for head in last_step(explanation, name):
            assert sorted(head.positions.tolist()) == list(range(head.context))
            torch.testing.assert_close(
                cached[head.kv_head],
                written[head.positions, head.kv_head],
                rtol=0,
                atol=0,
            )


def test_error_is_that_of_the_layers_output(llm, recorder, explanation):
    for name, layer in attention_layers(llm).items():
        rows = torch.cat(recorder.written[name]).float().transpose(0, 1)
        key, value = rows.chunk(2, dim=-1)
        query = recorder.query[name].float().unflatten(0, (len(rows), -1))
        dense = (layer.impl.scale * query @ key.mT).softmax(-1) @ value
        output = recorder.output[name].float().view_as(dense)
        expected = (output - dense).norm(dim=-1) / dense.norm(dim=-1)
        actual = [head.error for head in last_step(explanation, name)]
        # The layer's output is rounded to bf16.
        torch.testing.assert_close(torch.tensor(actual), expected, atol=0.01, rtol=0.02)


def test_heads_that_look_at_the_needle_select_it(explanation, needle):
    fact = range(NEEDLE_AT, NEEDLE_AT + len(needle))
    digits = [i for i in fact if explanation.tokens[i] in list("7421")]
    assert [explanation.tokens[i] for i in digits] == list("7421")
    looking = [h for h in explanation.heads if h.token_mass[digits].sum() > 0.3]
    assert looking
    for head in looking:
        selected = {i for c in head.clusters if c.selected for i in c.positions}
        assert selected >= {i for i in digits if head.token_mass[i] > 0.01}


def test_covering_budget_is_exact(llm, text_ids):
    explanation = explain_prompt(llm, text_ids[:300])
    for head in explanation.heads:
        assert head.attended == head.context == 301
        assert head.captured == pytest.approx([1] * 3, abs=1e-5)
        assert head.best == pytest.approx(1, abs=1e-5)
        assert head.estimated == [0] * 3
        assert max(head.error) < 1e-5
    assert "budget of 256 tokens covers the context" in explanation.summary()


def test_a_context_attended_to_densely(llm, text_ids, monkeypatch):
    monkeypatch.setattr(
        cpu_backend,
        "DecodeMetadata",
        lambda block_table, seq_lens, _: DecodeMetadata(
            block_table, seq_lens, seq_lens + 1
        ),
    )
    explanation = explain_prompt(llm, text_ids[:900])
    for head in explanation.heads:
        assert head.attended == head.context == 901
        assert not head.clusters
        assert head.always == pytest.approx([1] * 3, abs=1e-5)
        assert head.captured == pytest.approx([1] * 3, abs=1e-5)
        assert max(head.error) < 1e-5
    assert "shorter than min_sparse_len are attended to densely" in (
        explanation.summary()
    )


def test_prompt_shorter_than_a_page(llm):
    text = "Il était une fois 日本語 🦙🏔️, e\u0301t\u0301"
    explanation = explain_prompt(llm, text)
    prompt_tokens = explanation.tokens[: explanation.num_prompt_tokens]
    assert "".join(prompt_tokens) == text
    assert "Nothing was selected" in explanation.summary()


@pytest.fixture
def main(llm, monkeypatch):
    """The command line, with the engine that runs already."""
    monkeypatch.setattr(cli, "load", lambda *args, **kwargs: nullcontext(llm))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # undoes what it sets
    return cli.main


def test_command_line(main, llm, model_path, text_ids, tmp_path, capsys):
    prompt_file, json_file = tmp_path / "prompt.txt", tmp_path / "explanation.json"
    prompt_file.write_text(llm.get_tokenizer().decode(text_ids[:520]), encoding="utf-8")
    arguments = ["--model", model_path, "--prompt-file", str(prompt_file), "--chat"]
    main([*arguments, "--layer", "3", "--json", str(json_file)])
    text = capsys.readouterr().out
    assert "Chosen: layer 3, KV head" in text
    assert "\nSelected, " in text
    assert "\nLeft out, " in text
    explanation = json.loads(json_file.read_text(encoding="utf-8"))
    assert explanation["config"]["token_budget"] == BUDGET
    assert "<|im_end|>\n<|im_start|>assistant\n" in "".join(explanation["tokens"])
    assert len(explanation["heads"]) == 30 * 3
    [*_, head] = explanation["heads"]
    assert len(head["token_mass"]) == head["context"]
    assert {cluster["selected"] for cluster in head["clusters"]} == {True, False}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-steps", "2046"], "prompt must be 1 to 1 tokens long (max_model_len"),
        (["--token-budget", "0"], "--token-budget: must be a positive integer, got"),
        (["--prompt-file", "/nowhere"], "must be a readable UTF-8 text file, got"),
        (["--json", "/nowhere/x.json"], "--json: must be in an existing folder, got"),
        (["--layer", "30"], "argument --layer: must be 0 to 29, got 30"),
        (["--kv-head", "-1"], "argument --kv-head: must be 0 to 2, got -1"),
        (["--model", "/nowhere"], "--model: must be a folder or a name on a hub, got"),
    ],
)
def test_wrong_arguments(main, model_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", model_path, "--prompt", "The village", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, message",
    [
        ({"layer": 30}, "layer must be 0 to 29, got 30"),
        ({"kv_head": -1}, "kv_head must be 0 to 2, got -1"),
    ],
)
def test_no_such_layer_or_head(explanation, place, message):
    with pytest.raises(ValueError, match=message):
        explanation.summary(**place)


def test_wrong_setting(model_path):
    with (
        pytest.raises(ValueError, match="clusterkv.token_budget must be .* got 0"),
        load(model_path, token_budget=0),
    ):
        pass
