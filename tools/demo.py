# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Serves a small model with and without clusterkv and asks both the same question.

Run as `make demo`. The document is a part of Python's language reference (it comes
with Python) with one sentence hidden in it. Both servers answer the question through
the official OpenAI client. Then they take turns to answer again, from their prefix
caches, with a fixed number of tokens, and those are timed: side by side, since other
work on the machine slows both. The time a token took is the median gap between
streamed chunks, so it includes the HTTP server.
"""

import argparse
import json
import os
import pydoc_data.topics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from openai import OpenAI
from transformers import AutoTokenizer
from vllm_server import SERVED_MODEL_NAME, VllmServer, vllm_server

REPO = Path(__file__).parents[1]
FACT = (
    "The best thing to do in San Francisco is to eat a sandwich in Dolores Park "
    "on a sunny day."
)
QUESTION = "What is the best thing to do in San Francisco?"
EXPECTED = "Dolores Park"
NUM_TIMED_TOKENS = 32
NUM_ROUNDS = 4


@dataclass
class Result:
    """What one backend did with the request."""

    backend: str
    server: VllmServer
    answer: str = ""
    prompt_tokens: int = 0
    first_token_s: float = 0
    cached_first_token_s: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)  # between chunks

    @property
    def found(self) -> bool:
        """Whether the answer holds the hidden fact."""
        return EXPECTED in self.answer

    @property
    def ms_per_token(self) -> float:
        return median(self.gaps_ms)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(REPO / ".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--document-tokens", type=int, default=5000)
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--logs", type=Path, default=REPO / "demo-logs")
    args = parser.parse_args()
    if not (Path(args.model) / "config.json").exists():
        parser.error(f"--model must be a model folder, got {args.model}: `make model`")
    args.logs.mkdir(exist_ok=True)

    message = build_message(args.model, args.document_tokens)
    print(f"Document: {args.document_tokens:,} tokens of Python's language reference.")
    print(f"Hidden in it: {FACT!r}\nQuestion: {QUESTION}\n")
    stats_path = args.logs / "decode-steps.jsonl"
    stats_path.unlink(missing_ok=True)
    with ExitStack() as servers:
        results = [
            start(servers, backend, args, stats_path)
            for backend in ("CPU_ATTN", "CLUSTERKV")
        ]
        for result in results:
            ask(result, message)
        num_untimed_steps = len(stats_path.read_text().splitlines())
        print(f"Timing {NUM_ROUNDS} rounds of {NUM_TIMED_TOKENS} tokens ...\n")
        for _ in range(NUM_ROUNDS):
            for result in results:
                time_tokens(result, message)
    lines = stats_path.read_text().splitlines()[num_untimed_steps:]
    steps = [json.loads(line) for line in lines]
    print_comparison(results, steps, args.token_budget)
    return 0 if all(result.found for result in results) else 1


def build_message(model: str, num_tokens: int) -> str:
    """The document with the fact at 60%, and the question."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = AutoTokenizer.from_pretrained(model)
    token_ids = tokenizer.encode(text[: 8 * num_tokens])[:num_tokens]
    at = int(0.6 * len(token_ids))
    before, after = tokenizer.decode(token_ids[:at]), tokenizer.decode(token_ids[at:])
    return f"Read this document.\n\n{before}\n\n{FACT}\n\n{after}\n\n{QUESTION}"


def start(
    servers: ExitStack, backend: str, args: argparse.Namespace, stats_path: Path
) -> Result:
    """Starts a server with a backend; ``servers`` stops it."""
    flags = ["--max-model-len", "8192", "--dtype", "bfloat16", "--enforce-eager"]
    if backend == "CLUSTERKV":
        settings = {"token_budget": args.token_budget, "stats_path": str(stats_path)}
        flags += ["--attention-backend", "clusterkv"]
        flags += ["--additional-config", json.dumps({"clusterkv": settings})]
    log = args.logs / f"{backend.lower()}.log"
    print(f"[{backend}] starting the server ...", end=" ", flush=True)
    server = servers.enter_context(vllm_server(args.model, log, *flags))
    print(f"ready after {server.seconds_to_ready:.0f} s; log in {log.name}")
    print(f"[{backend}] $ {server.command}")
    return Result(backend, server)


def ask(result: Result, message: str) -> None:
    """The question, its answer printed as it comes."""
    print(f"\n[{result.backend}] answer: ", end="", flush=True)
    start_s = time.perf_counter()
    for chunk in stream(result.server, message, max_tokens=48):
        if chunk.usage is not None:
            result.prompt_tokens = chunk.usage.prompt_tokens
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            result.first_token_s = result.first_token_s or (
                time.perf_counter() - start_s
            )
            result.answer += piece
            print(piece, end="", flush=True)
    found = "found" if result.found else "NOT found"
    print(
        f"\n[{result.backend}] the fact was {found}; first token after "
        f"{result.first_token_s:.1f} s"
    )


def time_tokens(result: Result, message: str) -> None:
    """Adds the gaps between the tokens of one more answer."""
    times = [time.perf_counter()]
    for chunk in stream(
        result.server, message, max_tokens=NUM_TIMED_TOKENS, ignore_eos=True
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
    result.cached_first_token_s.append(times[1] - times[0])
    result.gaps_ms += [
        1e3 * (b - a) for a, b in zip(times[1:], times[2:], strict=False)
    ]


def stream(server: VllmServer, message: str, max_tokens: int, ignore_eos=False):
    """The chunks of a greedy chat completion."""
    return OpenAI(base_url=server.base_url, api_key="none").chat.completions.create(
        model=SERVED_MODEL_NAME,
        messages=[{"role": "user", "content": message}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": ignore_eos},
    )


def print_comparison(results: list[Result], steps: list[dict], budget: int) -> None:
    """The table at the end, and the attended share over the timed steps."""
    dense, sparse = results
    contexts = [step["context"][0] for step in steps]
    attended = [step["attended"][0] for step in steps]
    context, mean_attended = sum(contexts) / len(steps), sum(attended) / len(steps)
    speed_up = dense.ms_per_token / sparse.ms_per_token

    def of_each(show) -> list[str]:
        return [show(result) for result in results]

    rows = [
        ["", "vLLM default (CPU_ATTN)", f"clusterkv, budget {budget}"],
        ["fact in the answer", *of_each(lambda r: "yes" if r.found else "no")],
        ["prompt tokens", *of_each(lambda r: f"{r.prompt_tokens:,}")],
        ["context at a decode step", f"{context:,.0f}", f"{context:,.0f}"],
        [
            "attended to exactly",
            f"{context:,.0f} (100%)",
            f"{mean_attended:,.0f} ({100 * mean_attended / context:.0f}%)",
        ],
        ["first token", *of_each(lambda r: f"{r.first_token_s:.1f} s")],
        [
            "  asked again (cached)",
            *of_each(lambda r: f"{median(r.cached_first_token_s):.2f} s"),
        ],
        [
            "time a token",
            f"{dense.ms_per_token:.1f} ms",
            f"{sparse.ms_per_token:.1f} ms ({speed_up:.2f}x)",
        ],
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for i, row in enumerate(rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
        if i == 0:
            print("  ".join("-" * width for width in widths))
    num_cpus = len(os.sched_getaffinity(0))
    print(f"({num_cpus} CPUs; load over the last minute {os.getloadavg()[0]:.1f})")
    print(
        "\nA timed answer, step by step (tokens attended to exactly, of the context):"
    )
    for step in range(0, NUM_TIMED_TOKENS - 1, 5):
        share = attended[step] / contexts[step]
        print(
            f"  token {step + 2:3}  {attended[step]:5.0f} of {contexts[step]:5}  "
            f"|{'#' * round(40 * share):<40}|"
        )
    print(
        "\nThe count is the mean over layers and KV heads: the budget, 16 attention "
        "sinks and the\npage being filled (up to 256 tokens). Clusters left out are "
        "stood in for by their means."
    )


if __name__ == "__main__":
    sys.exit(main())
