# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The fidelity measurements: what they mean, and that a run can go on."""

import csv
import json

import pytest
import torch

from benchmarks.quality import fidelity
from benchmarks.quality.hf_runner import HFModel
from benchmarks.quality.methods import METHODS, make_method


def random_layer(contexts) -> fidelity.Layer:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    queries = 3 * normal(len(contexts), 6, 64)
    return fidelity.Layer(queries, normal(2, 900, 64), normal(2, 900, 64), 0.125)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_beats_the_best(name):
    contexts = [700, 900]
    found = fidelity.measure(
        random_layer(contexts), make_method(name), [64, 256, 900], contexts
    )
    for budget in (64, 256):
        measures = found[budget]
        assert measures["mass"] <= measures["best"] + 1e-6
        assert (measures["attended"] < 800) == (name != "full")
        assert (measures["error"] > 1e-3) == (name != "full")
    assert found[900]["mass"] == pytest.approx(1)
    assert found[900]["error"] == pytest.approx(0, abs=1e-5)
    assert found[900]["attended"] == 800
    assert found[900]["dense_kib"] == 800 * 64 * 4 / 1024


def test_the_oracle_is_ahead():
    contexts = [700, 900]
    layer = random_layer(contexts)
    errors, masses = {}, {}
    for name in METHODS:
        found = fidelity.measure(layer, make_method(name), [128], contexts)[128]
        errors[name], masses[name] = found["error"], found["mass"]
    for name in METHODS.keys() - {"full", "oracle", "ours", "ours-tail"}:
        assert masses["oracle"] > masses[name]
        assert errors["oracle"] < errors[name]


def test_capture_is_what_attention_was_given(tiny_model):
    model = HFModel(tiny_model)
    ids = list(range(100))
    layers = fidelity.capture(model, ids, [60, 100], [1])
    assert list(layers) == [1]
    assert layers[1].queries.shape == (2, 4, 32)
    assert layers[1].keys.shape == (2, 100, 32)
    shorter = fidelity.capture(model, ids, [60], [1])[1]
    for actual, expected in (
        (shorter.queries[0], layers[1].queries[0]),
        (shorter.keys, layers[1].keys[:, :60]),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert shorter.scale == pytest.approx(32**-0.5)


def test_contexts_of_positions():
    assert fidelity.decode_contexts(4096, [448, 64]) == [3648, 4032]
    assert fidelity.decode_contexts(4096, [512]) == [4096]
    assert fidelity.decode_contexts(100, [64, 300]) == [64]


def test_sweeps_become_methods():
    specs = fidelity.method_specs(
        ["quest", "ours"], ["page_size=128,256", "tail=false"], "ours-tail:vote=max"
    )
    assert specs == [
        "quest",
        "ours",
        "ours-tail:vote=max,page_size=128",
        "ours-tail:vote=max,page_size=256",
        "ours-tail:vote=max,tail=false",
    ]
    with pytest.raises(ValueError, match="ours-tail has the settings"):
        fidelity.method_specs([], ["pages=1"], "ours-tail")


def arguments(tiny_model, text_folder, out, *more) -> list[str]:
    return [
        *("--model", tiny_model, "--texts", str(text_folder), "--out", str(out)),
        *("--context-lens", "600", "--token-budgets", "32", "64"),
        *("--num-texts", "2", "--offsets", "64", *more),
    ]


def test_a_run_and_how_it_goes_on(
    tiny_model, text_folder, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    fidelity.main(arguments(tiny_model, text_folder, out, "--methods", "quest", "full"))
    printed = capsys.readouterr().out
    assert "text texts" in printed and "context 600, budget 32" in printed
    lines = (out / "fidelity.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * 2 * 2  # texts, layers, methods, budgets
    assert json.loads(lines[0])["error"] > 0
    rows = list(csv.DictReader((out / "fidelity.csv").open()))
    assert len(rows) == 2 * 2 * 3  # methods, budgets, two layers and their mean
    assert {row["layer"] for row in rows} == {"mean", "0", "1"}

    # Cut off within a line; what is missing is measured again, and nothing else.
    text = (out / "fidelity.jsonl").read_text()
    (out / "fidelity.jsonl").write_text(text[:-40])
    done = []
    measure = fidelity.measure

    def noted(*args):
        done.append(args[1:3])
        return measure(*args)

    monkeypatch.setattr(fidelity, "measure", noted)
    more = ("--methods", "quest", "full", "window")
    fidelity.main(arguments(tiny_model, text_folder, out, *more))
    assert len(done) == 1 + 2 * 2 and done[-1][1] == [32, 64]
    assert len((out / "fidelity.jsonl").read_text().splitlines()) == 24
    with pytest.raises(SystemExit):
        fidelity.main(arguments(tiny_model, text_folder, out, "--every-nth-layer", "2"))
    assert "settings" in capsys.readouterr().err
