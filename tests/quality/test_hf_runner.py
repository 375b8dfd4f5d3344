# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A tiny model with random weights, decoded with selections and without."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.quality.fidelity_math import compare
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
    actual = torch.tensor(runner.logprobs(prompt, continuation))
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
    exact = HFRunner(model, make_method("full"), 0).logprobs(prompt, continuation)
    sparse = HFRunner(model, make_method(name), 16).logprobs(prompt, continuation)
    assert sparse[0] == exact[0]  # by prefill
    assert sparse[1:] != exact[1:]
    dense_layers = HFRunner(model, make_method(name), 16, num_dense_layers=2)
    torch.testing.assert_close(
        torch.tensor(dense_layers.logprobs(prompt, continuation)), torch.tensor(exact)
    )


def test_the_question_can_be_decoded_too(model):
    [prompt, continuation] = prompts(700, 4)
    full, ours = make_method("full"), make_method("ours")
    exact = HFRunner(model, full, 0).logprobs(prompt, continuation)
    fed = HFRunner(model, full, 0, num_decoded_prompt_tokens=5)
    torch.testing.assert_close(
        torch.tensor(fed.logprobs(prompt, continuation)), torch.tensor(exact)
    )
    sparse = HFRunner(model, ours, 16, num_decoded_prompt_tokens=5)
    assert sparse.logprobs(prompt, continuation)[0] != exact[0]


def test_score_is_of_the_logits(model):
    [prompt, continuation] = prompts(700, 6)
    runner = HFRunner(model, make_method("quest"), 64, top_k=10)
    [scored] = runner.score([prompt], [continuation]).scored
    best = runner.logits(prompt, continuation).log_softmax(1).topk(10)
    assert scored.token_ids.tolist() == continuation
    assert scored.logprobs.tolist() == runner.logprobs(prompt, continuation)
    assert scored.top_ids.tolist() == best.indices.tolist()
    assert scored.top_logprobs.tolist() == best.values.tolist()


@pytest.mark.parametrize("name", METHODS)
def test_score_begins_with_dense_prefill(model, name):
    [prompt, continuation] = prompts(700, 6)
    full = HFRunner(model, make_method("full"), 0)
    # Also where the question of other tasks is decoded.
    runner = HFRunner(model, make_method(name), 16, num_decoded_prompt_tokens=5)
    [dense] = full.score([prompt], [continuation]).scored
    [scored] = runner.score([prompt], [continuation]).scored
    assert scored.logprobs[0] == dense.logprobs[0]
    assert (scored.top_ids[0] == dense.top_ids[0]).all()
    assert (compare(dense, scored)["kl"] > 1e-6) == (name != "full")


@pytest.mark.parametrize("name", METHODS)
def test_a_covering_budget_has_no_divergence(model, name):
    [prompt, continuation] = prompts(700, 6)
    [dense] = (
        HFRunner(model, make_method("full"), 0).score([prompt], [continuation]).scored
    )
    runner = HFRunner(model, make_method(name), 700)
    [scored] = runner.score([prompt], [continuation]).scored
    scores = compare(dense, scored)
    assert scores["agreement"] == 100
    assert scores["kl"] == pytest.approx(0, abs=1e-6)
    assert scores["logprob_gap"] == pytest.approx(0, abs=1e-5)


def test_attended_tokens_are_counted(model):
    [prompt, other, continuation] = prompts(700, 600, 5)
    full = HFRunner(model, make_method("full"), 0)
    assert full.mean_attended is None
    # Four steps, the first with one token behind the prompt.
    assert full.score([prompt], [continuation]).attended == 702.5
    both = full.score([prompt, other], [continuation, continuation[:3]])
    assert both.attended == pytest.approx((4 * 702.5 + 2 * 601.5) / 6)
    window = HFRunner(model, make_method("window"), 40)
    sinks_and_budget = 16 + 40
    generated = window.score([prompt], [continuation])
    assert generated.attended == sinks_and_budget + 702.5 - 512
    dense_layer = HFRunner(model, make_method("window"), 40, num_dense_layers=1)
    generated = dense_layer.score([prompt], [continuation])
    assert generated.attended == (sinks_and_budget + 702.5 - 512 + 702.5) / 2
    assert full.generate([prompt], 1) and full.mean_attended is None
    full.model.model.generation_config.eos_token_id = None
    assert full.generate([prompt], 4) and full.mean_attended == 702


class Waits(TorchDispatchMode):
    """Notes what would have the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "equal",
            "is_nonzero",
            "item",
            "masked_select",
            "nonzero",
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*METHODS, "clusterkv-published:tail=true"])
def test_no_step_waits(model, name):
    [prompt, continuation] = prompts(700, 6)
    runner = HFRunner(model, make_method(name), 64)
    token_ids = torch.tensor(continuation)
    decoder = runner._start(prompt, 0)
    with Waits() as waits:
        for token in token_ids[:, None]:
            decoder.step(token)
    assert waits.found == []
    with Waits() as waits, torch.inference_mode():
        int(decoder.logits.argmax())
    assert waits.found


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
    actual = HFRunner(narrow, method, 600).logprobs(prompt, continuation)
    expected = HFRunner(wide, method, 600).logprobs(prompt, continuation)
    assert actual == pytest.approx(expected, abs=1.0)
