# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Plots of the results."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLORS = {"dense": "black", "cpu_attn": "tab:gray"}


def plot_decode(results: Path, out: Path) -> None:
    """Time of a layer's decode attention against the context, and its ratio to dense.

    Args:
        results: CSV file of bench_decode_cpu.py; rows of batch 1 are plotted.
        out: PNG file.
    """
    with results.open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["batch_size"] == "1" and row["op"] in ("dense", "cpu_attn", "sparse")
        ]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        2, len(models), figsize=(5.5 * len(models), 7), sharex=True, squeeze=False
    )
    for column, model in enumerate(models):
        series: dict[str, list[dict]] = {}
        for row in rows:
            if row["model"] == model:
                name = f"{row['op']} {row['token_budget']}".strip()
                series.setdefault(name, []).append(row)
        time_axis, ratio_axis = axes[:, column]
        for name, points in series.items():
            contexts = [int(point["context_len"]) for point in points]
            style = {"marker": "o", "label": name, "color": _COLORS.get(name)}
            time_axis.plot(contexts, [float(p["time_us"]) for p in points], **style)
            if name != "dense":
                ratios = [float(p["dense_ratio"]) for p in points]
                ratio_axis.plot(contexts, ratios, **style)
        time_axis.set(
            title=f"{model}, batch 1", yscale="log", ylabel="microseconds a layer"
        )
        ratio_axis.axhline(1, color="black")
        ratio_axis.set(xlabel="context (tokens)", ylabel="times the speed of dense")
        ratio_axis.set_xscale("log", base=2)
        ratio_axis.set_xticks(contexts, [f"{n // 1024}k" for n in contexts])
        for axis in (time_axis, ratio_axis):
            axis.grid(alpha=0.3)
            axis.legend()
    figure.suptitle(
        f"Decode attention on {rows[0]['cpu']}, {rows[0]['threads']} threads"
    )
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(f"wrote {out}")
