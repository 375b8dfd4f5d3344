# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Time per output token of a real vLLM on this CPU, default backend and clusterkv.

One engine a backend, each in a process of its own, both up at the same time; they take
turns, so that noise meets both alike. A turn is two requests for the same prompt, whose
pages come from the prefix cache: one of a single token, one of NUM_TOKENS + 1; the
difference is NUM_TOKENS decode steps without any prefill. Eager mode.

Writes results/decode_step_cpu.csv, one row a context, backend and budget.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from timing import machine, positive

ROOT = Path(__file__).resolve().parent.parent
NUM_TOKENS = 24


def serve_turns(model: str, context_len: int, budget: int) -> None:
    """Child process: a turn for every line of standard input."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    backend = {}
    if budget:
        backend = {
            "attention_backend": "clusterkv",
            "additional_config": {"clusterkv": {"token_budget": budget}},
        }
    llm = LLM(
        model,
        dtype="bfloat16",
        max_model_len=context_len + NUM_TOKENS + 1,
        enforce_eager=True,
        **backend,
    )
    prompt = {
        "prompt_token_ids": [(7919 * i) % 40000 + 100 for i in range(context_len)]
    }

    def seconds(num_tokens: int) -> float:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        llm.generate([prompt], params, use_tqdm=False)
        return time.perf_counter() - start

    seconds(2)  # fills the prefix cache
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        ms = 1e3 * (seconds(NUM_TOKENS + 1) - seconds(1)) / NUM_TOKENS
        print(json.dumps({"tpot_ms": ms}), flush=True)


class Engine:
    """The parent's end of a child process."""

    def __init__(self, model: str, context_len: int, budget: int) -> None:
        env = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        command = [sys.executable, __file__, "--child", model]
        self.budget = budget
        self.tpot_ms: list[float] = []
        self._process = subprocess.Popen(
            [*command, "--context-lens", str(context_len), "--budgets", str(budget)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        self._read()

    def turn(self) -> None:
        print("turn", file=self._process.stdin, flush=True)
        self.tpot_ms.append(self._read()["tpot_ms"])

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self):
        # vLLM may print lines of its own.
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
        raise SystemExit(f"the engine with budget {self.budget} ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    model = ROOT / ".models/SmolLM2-135M-Instruct"
    parser.add_argument("--model", default=str(model))
    parser.add_argument(
        "--context-lens", type=positive, nargs="+", default=[1024, 8000]
    )
    parser.add_argument("--budgets", type=positive, nargs="+", default=[512])
    parser.add_argument("--turns", type=positive, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--child", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return serve_turns(args.child, args.context_lens[0], args.budgets[0])

    info = machine()
    rows = []
    for context_len in args.context_lens:
        engines = [Engine(args.model, context_len, b) for b in [0, *args.budgets]]
        for _ in range(args.turns):
            for engine in engines:
                engine.turn()
        for engine in engines:
            engine.stop()
            rows.append(
                {
                    "cpu": info["cpu"],
                    "threads": info["torch_threads"],
                    "model": Path(args.model).name,
                    "backend": "CLUSTERKV" if engine.budget else "CPU_ATTN",
                    "context_len": context_len,
                    "batch_size": 1,
                    "token_budget": engine.budget or "",
                    "tpot_ms": round(median(engine.tpot_ms), 2),
                    "min_ms": round(min(engine.tpot_ms), 2),
                    "max_ms": round(max(engine.tpot_ms), 2),
                }
            )
            print(rows[-1], flush=True)
    out = args.out / "decode_step_cpu.csv"
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    out.with_suffix(".machine.json").write_text(json.dumps(info, indent=2) + "\n")


if __name__ == "__main__":
    main()
