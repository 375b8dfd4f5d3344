# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What benchmarks compute from what they see, and dry runs of those of ops."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import server_metrics
from benchmarks.server_metrics import DecodeRate, Sample, decode_rate, parse
from vllm_clusterkv import page_layout

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Imports a module, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def streams(script):
    return script("streams")


def run_script(name, *words):
    subprocess.run(
        [sys.executable, ROOT / f"benchmarks/{name}.py", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )


def samples(*columns):
    """Of seconds, running, first tokens, finished, generated; preempted, if any."""
    names = [
        server_metrics.RUNNING,
        "vllm:time_to_first_token_seconds_count",
        "vllm:request_success_total",
        "vllm:generation_tokens_total",
        server_metrics.PREEMPTIONS,
    ]
    return [
        Sample(time_s, dict(zip(names, values, strict=False)))
        for time_s, *values in columns
    ]


def test_metrics_are_added_up_over_labels():
    text = """# HELP vllm:request_success_total Requests.
vllm:request_success_total{engine="0",finished_reason="stop"} 2.0
vllm:request_success_total{engine="0",finished_reason="a b"} 1e1
vllm:num_requests_running{engine="0"} 3.0
python_info{version="3"} 1.0
"""
    assert parse(text) == {
        "vllm:request_success_total": 12,
        "vllm:num_requests_running": 3,
    }


def test_decode_counts_where_nothing_else_ran():
    # Two that decode, then a third whose prompt is computed, then three, then two.
    seen = samples(
        (0.0, 0, 7, 7, 50),
        (1.0, 2, 9, 7, 60),
        (2.0, 2, 9, 7, 80),
        (3.0, 3, 9, 7, 82),
        (4.0, 3, 10, 7, 90),
        (5.5, 3, 10, 7, 150),
        (6.0, 2, 10, 8, 160),
        (7.0, 2, 10, 8, 180),
    )
    assert decode_rate(seen) == DecodeRate(3, 1.5, 40)
    assert decode_rate(seen, min_seconds=1.6) == DecodeRate(2, 2, 20)
    assert decode_rate(seen, min_seconds=3) is None


def test_preempted_requests_do_not_decode():
    seen = samples(
        (0.0, 0, 0, 0, 0, 0),
        (1.0, 2, 2, 0, 10, 0),
        (2.0, 2, 2, 0, 20, 1),  # one went and came back
        (3.0, 1, 2, 0, 30, 2),  # one is away
        (4.0, 1, 2, 0, 40, 2),
    )
    assert decode_rate(seen) is None


def test_most_that_decode_at_once(streams):
    spans = [(0, 4), (1, 2), (2, 5), (3, 6)]
    crowd = [streams.Stream(0, [(first, 1), (last, 9)]) for first, last in spans]
    assert streams.max_decoding(crowd) == 3
    assert crowd[0].tpot_s == 0.5 and crowd[1].ttft_s == 1


def test_throughput_goes_on_where_it_ended(script, monkeypatch, tmp_path):
    bench = script("bench_throughput")

    def parse_args(*words):
        words = ["x", "--model", "m", "--out", str(tmp_path), *words]
        monkeypatch.setattr(sys, "argv", words)
        return bench.parse_args()

    args = parse_args("--concurrency", "2", "4", "--output-len", "16", "32")
    info = {"commit": "c", "gpu": "g", "vllm": "0", "torch": "0"}
    info["settings"] = bench.server_settings(args)
    assert bench.read_results(tmp_path, info) == ([], {})
    row = bench.point_columns("clusterkv", args, (2, 16))
    bench.write_results(tmp_path, [row], info, {"clusterkv": {}})
    rows, facts = bench.read_results(tmp_path, info)
    assert facts == {"clusterkv": {}}
    missing = [(2, 32), (4, 16), (4, 32)]
    assert bench.missing_points("clusterkv", args, rows) == missing
    assert len(bench.missing_points("dense", args, rows)) == 4
    for name, other in [
        ("commit", "d"),
        ("prompt_len", bench.server_settings(parse_args("--prompt-len", "64"))),
    ]:
        changed = {"settings": other} if name == "prompt_len" else {name: other}
        with pytest.raises(ValueError, match=f"with {name} = .*give another folder"):
            bench.read_results(tmp_path, info | changed)


def test_throughput_needs_requests(script, monkeypatch, capsys):
    bench = script("bench_throughput")
    words = ["x", "--model", "m", "--concurrency", "0"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        bench.parse_args()
    assert "--concurrency: must be 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("num_clusters", page_layout.CLUSTERS)
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_traffic_is_of_the_indexs_fields(script, head_size, num_clusters):
    traffic = script("traffic")
    layout = page_layout.PageLayout(8, head_size, num_clusters, torch.bfloat16)
    index = torch.zeros(layout.index_bytes, dtype=torch.uint8)
    fields = vars(page_layout.IndexFields.of(index, head_size, layout.dtype))
    of_values = fields["value_codes"].nbytes + fields["value_steps"].nbytes
    assert traffic.mean_value_bytes(layout) * num_clusters == of_values
    assert traffic.scored_bytes(layout) == layout.index_bytes - of_values


def test_decode_runs_on_a_cpu(tmp_path):
    words = "--num-heads 4 --num-kv-heads 2 --head-size 64 --context-lens 1024"
    words += " --batch-sizes 2 --token-budgets 256 --repeats 2 --no-plot"
    run_script("bench_decode_cpu", *words.split(), "--out", tmp_path / "decode.csv")
    with (tmp_path / "decode.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = ["score_clusters", "select_clusters", "sparse_decode", "sparse"]
    assert {row["op"] for row in rows} >= {"dense", "cpu_attn", "index_pages", *parts}
    assert all(float(row["time_us"]) > 0 for row in rows)


def test_ops_run_dry_on_a_cpu(tmp_path):
    words = "--device cpu --context-lens 2048 --batch-sizes 1 --replays 2"
    words += f" --pool-gib 0.2 --out {tmp_path} --baselines"
    run_script("bench_ops", *words.split())
    with (tmp_path / "ops.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} >= {"score_clusters", "index_pages"}
    with pytest.raises(subprocess.CalledProcessError):
        run_script("bench_ops", "--device", "cpu")


def test_recall_runs_dry_on_a_cpu(tmp_path):
    words = "--rows 1 2 --context-len 2048 --max-model-len 2048 --token-budget 128"
    words += " --miss-shares 0 0.25 1 --replays 2 --max-layers 2 --device cpu"
    words += f" --host-gib 0.1 --copy-gib 0.01 --out {tmp_path}"
    run_script("bench_recall", *words.split())
    with (tmp_path / "recall.csv").open() as file:
        copy, *rows = csv.DictReader(file)
    assert copy["what"] == "copy" and float(copy["gb_s"]) > 0
    each = ["recall", "resident", "no_slot", "bypass", *["recalled"] * 3]
    assert [row["what"] for row in rows] == each * 2
    for row in rows:
        assert float(row["time_us"]) > 0
        if row["miss_share"]:
            missed = float(row["miss_share"]) * int(row["lines"])
            line_bytes = 8 * 2 * 128 * 2
            assert int(row["bytes"]) == pytest.approx(missed * line_bytes, rel=0.01)
    shares = [float(row["miss_share"]) for row in rows if row["what"] == "recalled"]
    assert shares == pytest.approx([0, 0.25, 1] * 2, abs=0.05)
    assert (tmp_path / "recall.machine.json").exists()
