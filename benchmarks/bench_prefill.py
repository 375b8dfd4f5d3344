# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Time to the first token and to the second of a real vLLM engine, dense and sparse.

Prefill is dense on both sides; sparse indexes the pages that it fills. Those of a step
are indexed when the next step begins, so those of a prompt's last chunk are in the time
to the second token and not in that to the first: tt2t_ms has all of it.

Single requests of random tokens, other ones each time, no prefix caching, chunks as
large as vLLM makes them by default (max_num_batched_tokens, in the JSON file). Medians;
p10 and p90 of the repetitions are beside them. See engine.py.

Writes prefill.csv and prefill.machine.json and, with matplotlib, prefill.png.
"""

import argparse
from collections.abc import Iterator

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

NUM_TOKENS = 4


def measure(engine: Engine, task: dict) -> Iterator[dict]:
    """Child: a row for each length."""
    longest = engine.max_model_len - NUM_TOKENS
    lengths = [length for length in task["context_lens"] if length <= longest]
    times: dict[int, list[tuple[float, float]]] = {length: [] for length in lengths}
    for turn in range(-1, task["repeats"]):  # the first one warms up
        for length in lengths:
            prompt = random_prompt(turn + 1, length, engine.vocab_size, seed=length)
            ends = [end for end, _ in engine.generate([prompt], NUM_TOKENS)]
            if turn >= 0:
                times[length].append((ends[0], ends[1]))
    for length, found in times.items():
        first, second = 1e3 * np.array(found).T
        yield {
            "context_len": length,
            "ttft_ms": round(float(np.median(first)), 2),
            "tt2t_ms": round(float(np.median(second)), 2),
            "ttft_p10_ms": round(float(np.quantile(first, 0.1)), 2),
            "ttft_p90_ms": round(float(np.quantile(first, 0.9)), 2),
            "tt2t_p10_ms": round(float(np.quantile(second, 0.1)), 2),
            "tt2t_p90_ms": round(float(np.quantile(second, 0.9)), 2),
            "repeats": len(found),
        }


def print_ratios(rows: list[dict]) -> None:
    """Both sides' times, and what sparse adds."""
    by_length: dict[int, dict[str, dict]] = {}
    for row in rows:
        by_length.setdefault(row["context_len"], {})[row["side"]] = row
    for length, sides in sorted(by_length.items()):
        if len(sides) < 2:
            continue
        cells = [f"{length:>8}"]
        for column in ("ttft_ms", "tt2t_ms"):
            dense, sparse = (sides[side][column] for side in ("dense", "sparse"))
            cells.append(
                f"{column}: dense {dense:.1f}, sparse {sparse:.1f} "
                f"({sparse / dense - 1:+.1%})"
            )
        print(" | ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(parser)
    add = parser.add_argument
    add("--context-lens", type=positive, nargs="+", default=[4096, 16384, 32768])
    add("--repeats", type=positive, default=7)
    args = parser.parse_args()
    if args.child:
        run_child(args.child, measure)
        return

    common = {"max_num_seqs": 64, "enable_prefix_caching": False}
    task = {"context_lens": args.context_lens, "repeats": args.repeats}
    rows, facts = run_sides("prefill", __file__, args, common, task)
    print_ratios(rows)
    check_alike(args, facts)
    draw("plot_prefill", args.out, "prefill")


if __name__ == "__main__":
    main()
