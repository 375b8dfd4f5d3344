# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Plots of the results."""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_RESULTS = Path(__file__).parent / "results"
_COLORS = {"dense": "black", "cpu_attn": "tab:gray"}
_OP_COLORS = {
    "decode": "tab:blue",
    "decode_dense": "tab:cyan",
    "flash_attn": "black",
    "flashinfer": "tab:green",
    "xformers": "tab:gray",
}

_BACKEND_COLORS = {
    "dense": "black",
    "dense+offload": "tab:gray",
    "clusterkv": "tab:blue",
}


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
    figure.savefig(out, dpi=120, bbox_inches="tight")
    print(f"wrote {out}")


def plot_ops(results: Path, out: Path) -> None:
    """Decode attention's time against the context, of each batch size.

    Args:
        results: CSV file of bench_ops.py.
        out: PNG file.
    """
    shown = ["decode", "decode_dense", "flash_attn", "flashinfer", "xformers"]
    with results.open() as file:
        rows = [row for row in csv.DictReader(file) if row["op"] in shown]
    batch_sizes = sorted({int(row["batch_size"]) for row in rows})
    figure, axes = plt.subplots(
        1, len(batch_sizes), figsize=(5.5 * len(batch_sizes), 4.5), squeeze=False
    )
    for axis, batch_size in zip(axes[0], batch_sizes, strict=True):
        series: dict[str, dict[int, float]] = {}
        for row in rows:
            if int(row["batch_size"]) == batch_size:
                points = series.setdefault(row["op"], {})
                points[int(row["context_len"])] = float(row["time_us"])
        for op, points in series.items():
            _plot_points(axis, points, op, _OP_COLORS[op])
        axis.set(title=f"batch {batch_size}", ylabel="microseconds a layer")
    budget = next(row["token_budget"] for row in rows if row["token_budget"])
    figure.suptitle(
        f"Decode attention, {rows[0]['model']}, budget {budget}, {rows[0]['gpu']}"
    )
    _save(figure, out)


def plot_engine_decode(results: Path, out: Path) -> None:
    """Time per output token against the prompt, of each batch size.

    Args:
        results: CSV file of bench_decode.py.
        out: PNG file.
    """
    with results.open() as file:
        rows = list(csv.DictReader(file))
    batch_sizes = sorted({int(row["batch_size"]) for row in rows})
    figure, axes = plt.subplots(
        1, len(batch_sizes), figsize=(5.5 * len(batch_sizes), 4.5), squeeze=False
    )
    for axis, batch_size in zip(axes[0], batch_sizes, strict=True):
        for backend in dict.fromkeys(row["backend"] for row in rows):
            points = {
                int(row["context_len"]): float(row["tpot_ms"])
                for row in rows
                if row["backend"] == backend and int(row["batch_size"]) == batch_size
            }
            _plot_points(axis, points, backend, _backend_color(backend))
        axis.set(title=f"batch {batch_size}", ylabel="ms per output token")
        axis.set_yscale("linear")
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    figure.suptitle(f"{rows[0]['model']} in vLLM, {rows[0]['gpu']}")
    _save(figure, out)


def plot_prefill(results: Path, out: Path) -> None:
    """Time to the first and to the second token against the prompt.

    Args:
        results: CSV file of bench_prefill.py.
        out: PNG file.
    """
    with results.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for axis, column, name in zip(
        axes, ("ttft_ms", "tt2t_ms"), ("first", "second"), strict=True
    ):
        for backend in dict.fromkeys(row["backend"] for row in rows):
            points = {
                int(row["context_len"]): float(row[column])
                for row in rows
                if row["backend"] == backend
            }
            _plot_points(axis, points, backend, _backend_color(backend))
        axis.set(title=f"time to the {name} token", ylabel="ms")
    figure.suptitle(f"{rows[0]['model']} in vLLM, {rows[0]['gpu']}")
    _save(figure, out)


def plot_throughput(results: Path, out: Path) -> None:
    """Tokens a second and requests that decode at once, against the concurrency.

    Args:
        results: CSV file of bench_throughput.py.
        out: PNG file.
    """
    with results.open() as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    columns = {
        "output_tok_s": "output tokens a second, whole run",
        "decode_tok_s": "output tokens a second, decode alone",
        "max_decoding": "requests decoding at once, at most",
    }
    figure, axes = plt.subplots(1, len(columns), figsize=(5.5 * len(columns), 4.5))
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        line_columns = ("backend", "output_len", "max_num_batched_tokens")
        lines = dict.fromkeys(tuple(row[name] for name in line_columns) for row in rows)
        for line in lines:
            backend, output_len, chunk = line
            points = {
                int(row["concurrency"]): float(row[column])
                for row in rows
                if tuple(row[name] for name in line_columns) == line and row[column]
            }
            if not points:
                continue
            numbers = sorted(points)
            axis.plot(
                numbers,
                [points[n] for n in numbers],
                "o-" if output_len == first["output_len"] else "s--",
                label=f"{backend}, {output_len} tokens each, chunks of {chunk}",
                color=_BACKEND_COLORS[backend],
                fillstyle="full"
                if chunk == first["max_num_batched_tokens"]
                else "none",
            )
        axis.set(title=title, xlabel="requests sent at once")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
    )
    figure.suptitle(
        f"{first['model']} in vllm serve, prompts of {first['prompt_len']} tokens, "
        f"{first['gpu']}"
    )
    _save(figure, out)


def plot_recall(results: Path, out: Path) -> None:
    """Recall's speed, what it adds to a layer's decode, and hit rates of a hot cache.

    Args:
        results: CSV file of bench_recall.py. The hit rates are those of hit_rate.csv
            in ``results/``, which has them by models' own keys.
        out: PNG file.
    """
    with results.open() as file:
        rows = list(csv.DictReader(file))
    figure, (speed, exposed, hits) = plt.subplots(1, 3, figsize=(16.5, 4.5))
    recall = {int(r["rows"]): float(r["gb_s"]) for r in rows if r["what"] == "recall"}
    speed.plot(list(recall), list(recall.values()), "o-", label="recall, all missed")
    copy = next(float(row["gb_s"]) for row in rows if row["what"] == "copy")
    speed.axhline(copy, color="black", label="cudaMemcpyAsync")
    speed.set(title="from host memory", ylabel="GB/s")
    names = {"no_slot": "nothing on the host", "bypass": "no hot blocks"}
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["exposed_us"]:
            name = names.get(row["what"]) or f"{float(row['miss_share']):.0%} missed"
            series.setdefault(name, {})[int(row["rows"])] = float(row["exposed_us"])
    for name, points in series.items():
        exposed.plot(list(points), list(points.values()), "o-", label=name)
    exposed.set_yscale("symlog")
    exposed.set(title="added to a layer's decode", ylabel="microseconds")
    for axis in (speed, exposed):
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(recall), [str(n) for n in recall])
        axis.set_xlabel("rows")
    speed.set_ylim(bottom=0)
    budget = next(row["token_budget"] for row in rows if row["token_budget"])
    _plot_hit_rates(hits, _RESULTS / "hit_rate.csv", budget)
    for axis in (speed, exposed, hits):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    first = rows[-1]
    figure.suptitle(
        f"Recall, {first['model']}, {first['context_len']} tokens, budget {budget}, "
        f"{first['gpu']}"
    )
    _save(figure, out)


def _plot_hit_rates(axis, results: Path, token_budget: str) -> None:
    """Of lines of 8 rows, the mean of the layers, for each model and context."""
    series: dict[str, dict[int, float]] = {}
    with results.open() as file:
        for row in csv.DictReader(file):
            is_shown = (row["layer"], row["line_rows"]) == ("mean", "8")
            if is_shown and row["token_budget"] == token_budget:
                name = f"{row['model']}, {int(row['context_len']) // 1024}k"
                points = series.setdefault(name, {})
                points[int(row["hot_cache_tokens"])] = float(row["hit_rate"])
    for name, points in series.items():
        sizes = sorted(points)
        axis.plot(sizes, [points[n] for n in sizes], "o-", label=name)
    title = f"hit rate at budget {token_budget} (hit_rate.csv)"
    axis.set(title=title, xlabel="hot cache (tokens)", ylim=(0, 1))


def _plot_points(axis, points: dict[int, float], name: str, color: str) -> None:
    """A line over the context, both logarithmic."""
    contexts = sorted(points)
    axis.plot(contexts, [points[n] for n in contexts], "o-", label=name, color=color)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(contexts, [f"{n / 1024:g}k" for n in contexts])
    axis.set_xlabel("context (tokens)")
    axis.grid(alpha=0.3)
    axis.legend()


def _backend_color(backend: str) -> str:
    return "tab:blue" if backend == "CLUSTERKV" else "black"


def _save(figure, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, dpi=120, bbox_inches="tight")
    print(f"wrote {out}")


def main() -> None:
    """Draws every result in a folder anew; the folder is the argument, if any."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else _RESULTS
    plots = {
        "decode_cpu": plot_decode,
        "ops": plot_ops,
        "decode": plot_engine_decode,
        "prefill": plot_prefill,
        "throughput": plot_throughput,
        "recall": plot_recall,
    }
    for name, plot in plots.items():
        if (folder / f"{name}.csv").exists():
            plot(folder / f"{name}.csv", folder / f"{name}.png")


if __name__ == "__main__":
    main()
