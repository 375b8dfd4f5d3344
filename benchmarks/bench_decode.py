# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Time per output token of a real vLLM engine on a GPU, dense and sparse.

A point is a prompt length and a batch. Its prompts, random and all different, are first
served for one token each, which leaves their pages in the prefix cache. Then they are
served together, --windows times, and only steps count in which every request decodes:
256 of them, in which every row fills exactly one page, so that the cost of indexing is
in the figure with the weight that it has in a long answer. tpot_ms is the time of these
steps over their number, the median of the windows; p10, p50 and p90 are of single
steps.

The first steps behind a prefill, one of which indexes the prompt's last pages, are not
counted here: bench_prefill.py has them. Both sides get the same max_model_len, the
model's own by default; FLASH_ATTN's launch does not depend on it beyond the width of
the block table. An engine a side, one after another; see engine.py.

Writes decode.csv, decode.machine.json and, with matplotlib, decode.png.
"""

import argparse
from collections.abc import Iterator
from statistics import median

import numpy as np
from engine import (
    Engine,
    add_engine_arguments,
    check_alike,
    draw,
    random_prompt,
    run_child,
    run_sides,
)
from timing import positive

POINTS = [(length, batch) for length in (4096, 2048, 512) for batch in (64, 8, 1)]
POINTS += [(32768, 8), (32768, 1), (122880, 1)]
SKIPPED_STEPS = 4  # behind the last prefill: its pages are indexed, graphs settle


def measure(engine: Engine, task: dict) -> Iterator[dict]:
    """Child: a row for each point."""
    steps = task["steps"]
    num_tokens = steps + task["slack"]
    for context_len, batch_size in task["points"]:
        point = {"context_len": context_len, "batch_size": batch_size}
        length = context_len + num_tokens
        if length > engine.max_model_len or batch_size * length > engine.kv_tokens:
            yield point | {"left_out": "does not fit"}
            continue
        prompts = [
            random_prompt(row, context_len, engine.vocab_size)
            for row in range(batch_size)
        ]
        engine.generate(prompts, 1)
        served = [engine.generate(prompts, num_tokens) for _ in range(task["windows"])]
        windows = [decode_window(some, batch_size, steps) for some in served]
        if all(windows):
            yield point | summary(windows)
        else:
            yield point | {"left_out": "the requests did not decode together"}


def decode_window(
    served: list[tuple[float, dict[str, int]]], batch_size: int, steps: int
) -> list[float]:
    """Times at the ends of ``steps`` pure decode steps, and of the step before them.

    Args:
        served: Of every step, its end and the tokens of each request.
        batch_size: Requests.
        steps: Steps that count.

    Returns:
        ``steps + 1`` times; none if the requests did not decode together for so long.
    """
    run: list[float] = []
    for end, tokens in served:
        decodes = len(tokens) == batch_size and set(tokens.values()) == {1}
        if not decodes:
            if len(run) > SKIPPED_STEPS + steps:
                break
            run = []
            continue
        run.append(end)
    window = run[SKIPPED_STEPS : SKIPPED_STEPS + steps + 1]
    return window if len(window) > steps else []


def summary(windows: list[list[float]]) -> dict:
    """Columns of a point."""
    single = 1e3 * np.concatenate([np.diff(window) for window in windows])
    tpots = [1e3 * (window[-1] - window[0]) / (len(window) - 1) for window in windows]
    p10, p50, p90 = np.quantile(single, [0.1, 0.5, 0.9])
    return {
        "tpot_ms": round(median(tpots), 3),
        "p10_ms": round(float(p10), 3),
        "p50_ms": round(float(p50), 3),
        "p90_ms": round(float(p90), 3),
        "steps": len(windows[0]) - 1,
        "windows": len(windows),
    }


def print_ratios(rows: list[dict]) -> None:
    """Both sides' times, and how many times dense's speed sparse has."""
    points: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        point = points.setdefault((row["context_len"], row["batch_size"]), {})
        point[row["side"]] = row["tpot_ms"]
    print(f"{'context':>8}{'batch':>6}{'dense ms':>10}{'sparse ms':>10}{'speed':>8}")
    for (context_len, batch_size), sides in sorted(points.items()):
        dense, sparse = sides.get("dense"), sides.get("sparse")
        cells = "".join(
            f"{ms:>10.2f}" if ms else f"{'-':>10}" for ms in (dense, sparse)
        )
        ratio = f"{dense / sparse:>7.2f}x" if dense and sparse else ""
        print(f"{context_len:>8}{batch_size:>6}{cells}{ratio}")


def parse_point(text: str) -> tuple[int, int]:
    """ "32768x8" -> (32768, 8)."""
    context_len, batch_size = map(int, text.split("x"))
    return context_len, batch_size


def parse_points(text: str) -> list[tuple[int, int]]:
    return [parse_point(point) for point in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(parser)
    add = parser.add_argument
    default = ",".join(f"{length}x{batch}" for length, batch in POINTS)
    add("--points", type=parse_points, default=POINTS, help=f"default: {default}")
    add("--steps", type=positive, default=256)
    add("--windows", type=positive, default=2)
    args = parser.parse_args()
    if args.child:
        run_child(args.child, measure)
        return

    batch_sizes = [batch_size for _, batch_size in args.points]
    common = {"max_num_seqs": max(batch_sizes), "enable_prefix_caching": True}
    task = {
        "points": args.points,
        "steps": args.steps,
        "windows": args.windows,
        # Rows of a large batch start some steps apart, at a page of prompt each.
        "slack": SKIPPED_STEPS + 8 + max(batch_sizes) // 4,
    }
    rows, facts = run_sides("decode", __file__, args, common, task)
    print_ratios(rows)
    check_alike(args, facts)
    draw("plot_engine_decode", args.out, "decode")


if __name__ == "__main__":
    main()
