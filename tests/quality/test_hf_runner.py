# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A tiny model with random weights, decoded with selections and without."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.quality.hf_runner import METHODS, HFModel, HFRunner, make_method

SIZES = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "eos_token_id": 3,
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory) -> str:
    """Folder of the model."""
    torch.manual_seed(0)
    config, model = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model(config(**SIZES)).eval().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(path) -> HFModel:
    return HFModel(path)


def prompts(*lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(4, 128, (length,), generator=generator).tolist()
        for length in lengths
    ]


def test_full_generates_what_transformers_does(model, path):
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    given = prompts(1, 20, 400, 513)
    answers = HFRunner(model, make_method("full"), 0).generate(given, 20)
    for prompt, answer in zip(given, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, max_new_tokens=20, do_sample=False)
        assert answer == expected[0, len(prompt) :].tolist()


def test_full_scores_as_one_dense_pass(model):
    [prompt, continuation] = prompts(300, 12)
    with torch.inference_mode():
        logits = model.model(torch.tensor([prompt + continuation])).logits[0, 299:-1]
    expected = logits.log_softmax(1)[range(12), continuation]
    runner = HFRunner(model, make_method("full"), 0)
    actual = torch.tensor(runner.score(prompt, continuation))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    rows = runner.logits(prompt, continuation)
    torch.testing.assert_close(rows, logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_covering_budget_answers_as_full(model, name):
    [prompt] = prompts(520)
    expected = HFRunner(model, make_method("full"), 0).generate([prompt], 8)
    assert HFRunner(model, make_method(name), 1000).generate([prompt], 8) == expected


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_a_small_budget_changes_scores(model, name):
    [prompt, continuation] = prompts(700, 4)
    exact = HFRunner(model, make_method("full"), 0).score(prompt, continuation)
    sparse = HFRunner(model, make_method(name), 16).score(prompt, continuation)
    assert sparse[0] == exact[0]  # by prefill
    assert sparse[1:] != exact[1:]
    dense_layers = HFRunner(model, make_method(name), 16, num_dense_layers=2)
    torch.testing.assert_close(
        torch.tensor(dense_layers.score(prompt, continuation)), torch.tensor(exact)
    )


def test_the_question_can_be_decoded_too(model):
    [prompt, continuation] = prompts(700, 4)
    full, ours = make_method("full"), make_method("ours")
    exact = HFRunner(model, full, 0).score(prompt, continuation)
    fed = HFRunner(model, full, 0, num_decoded_prompt_tokens=5)
    torch.testing.assert_close(
        torch.tensor(fed.score(prompt, continuation)), torch.tensor(exact)
    )
    sparse = HFRunner(model, ours, 16, num_decoded_prompt_tokens=5)
    assert sparse.score(prompt, continuation)[0] != exact[0]


def test_an_answer_ends_with_eos(model):
    runner = HFRunner(model, make_method("full"), 0)
    [prompt] = prompts(50)
    answer = runner.generate([prompt], 6)[0]
    model.model.generation_config.eos_token_id = [answer[2]]
    end = answer.index(answer[2]) + 1
    assert runner.generate([prompt], 6)[0] == answer[:end]


def test_prefill_is_computed_once_and_not_changed(model):
    [prompt, other] = prompts(600, 300)
    first = model.prefill(prompt)
    before = [keys.clone() for keys, _ in first.layers()]
    for name in ("ours-tail", "quest", "clusterkv-published"):
        runner = HFRunner(model, make_method(name), 32)
        assert runner.generate([prompt], 9) == runner.generate([prompt], 9)
    assert model.prefill(prompt) is first
    for (keys, _), old in zip(first.layers(), before, strict=True):
        assert torch.equal(keys, old)
    model._prefill_bytes = 0
    model.prefill(other)
    assert model.prefill(prompt) is not first


@pytest.mark.parametrize("name", METHODS)
def test_16_bits(path, name):
    [prompt, continuation] = prompts(700, 4)
    narrow = HFModel(path, dtype=torch.bfloat16)
    wide = HFModel(path)
    method = make_method(name)
    actual = HFRunner(narrow, method, 600).score(prompt, continuation)
    expected = HFRunner(wide, method, 600).score(prompt, continuation)
    assert actual == pytest.approx(expected, abs=1.0)
