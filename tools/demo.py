# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Serves a small model with and without clusterkv and asks both the same question.

Run as `make demo`. The document is a part of Python's language reference (it comes
with Python) with one sentence hidden in it. Each server answers the question through
the official OpenAI client; then it is asked again for a fixed number of tokens, from
its prefix cache, and those tokens are timed. The time a token took is the mean gap
between streamed tokens, so it includes the HTTP server.
"""

import argparse
import json
import pydoc_data.topics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

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
NUM_TIMED_TOKENS = 64


@dataclass
class Result:
    """What one backend did with the request."""

    backend: str
    answer: str
    first_token_s: float
    cached_first_token_s: float
    ms_per_token: float
    prompt_tokens: int
    attended: list[float] = field(default_factory=list)  # tokens, one a decode step
    context: list[int] = field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether the answer holds the hidden fact."""
        return EXPECTED in self.answer


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
    results = [
        run_backend("CPU_ATTN", args, message),
        run_backend("CLUSTERKV", args, message),
    ]
    print_comparison(results, args)
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


def run_backend(backend: str, args: argparse.Namespace, message: str) -> Result:
    """Serves the model with a backend, asks, and stops the server."""
    stats_path = args.logs / "decode-steps.jsonl"
    stats_path.unlink(missing_ok=True)
    flags = ["--max-model-len", "8192", "--dtype", "bfloat16", "--enforce-eager"]
    if backend == "CLUSTERKV":
        settings = {"token_budget": args.token_budget, "stats_path": str(stats_path)}
        flags += ["--attention-backend", "clusterkv"]
        flags += ["--additional-config", json.dumps({"clusterkv": settings})]
    log = args.logs / f"{backend.lower()}.log"
    print(f"[{backend}] starting the server ...", end=" ", flush=True)
    with vllm_server(args.model, log, *flags) as server:
        print(f"ready after {server.seconds_to_ready:.0f} s; log in {log.name}")
        print(f"[{backend}] $ {server.command}")
        print(f"[{backend}] answer: ", end="", flush=True)
        result = ask(backend, server, message)
    if stats_path.exists():
        steps = [json.loads(line) for line in stats_path.read_text().splitlines()]
        result.context = [step["context"][0] for step in steps]
        result.attended = [step["attended"][0] for step in steps]
    found = "found" if result.found else "NOT found"
    print(
        f"[{backend}] the fact was {found}; first token after "
        f"{result.first_token_s:.1f} s, {result.cached_first_token_s:.2f} s when asked "
        f"again; {result.ms_per_token:.1f} ms a token\n"
    )
    return result


def ask(backend: str, server: VllmServer, message: str) -> Result:
    """The question once for its answer, and once more to time tokens."""
    client = OpenAI(base_url=server.base_url, api_key="none")

    def stream(max_tokens: int, ignore_eos: bool, show: bool):
        times, pieces, usage = [time.perf_counter()], [], None
        for chunk in client.chat.completions.create(
            model=SERVED_MODEL_NAME,
            messages=[{"role": "user", "content": message}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": ignore_eos},
        ):
            usage = chunk.usage or usage
            if not chunk.choices or chunk.choices[0].delta.content is None:
                continue
            piece = chunk.choices[0].delta.content
            # The first chunk announces the role; it carries no token.
            if piece or len(times) > 1:
                times.append(time.perf_counter())
            pieces.append(piece)
            if show:
                print(piece, end="", flush=True)
        return times, "".join(pieces), usage

    times, answer, usage = stream(max_tokens=48, ignore_eos=False, show=True)
    print()
    timed, _, timed_usage = stream(NUM_TIMED_TOKENS, ignore_eos=True, show=False)
    return Result(
        backend=backend,
        answer=answer,
        first_token_s=times[1] - times[0],
        cached_first_token_s=timed[1] - timed[0],
        # Tokens without text of their own share a chunk with the next.
        ms_per_token=1e3 * (timed[-1] - timed[1]) / (timed_usage.completion_tokens - 1),
        prompt_tokens=usage.prompt_tokens,
    )


def print_comparison(results: list[Result], args: argparse.Namespace) -> None:
    """The table at the end, and how the attended share moved over the steps."""
    dense, sparse = results
    context = sum(sparse.context) / len(sparse.context)
    attended = sum(sparse.attended) / len(sparse.attended)
    speed_up = dense.ms_per_token / sparse.ms_per_token

    def of_each(show) -> list[str]:
        return [show(result) for result in results]

    rows = [
        ["", "vLLM default (CPU_ATTN)", f"clusterkv, budget {args.token_budget}"],
        ["fact in the answer", *of_each(lambda r: "yes" if r.found else "no")],
        ["prompt tokens", *of_each(lambda r: f"{r.prompt_tokens:,}")],
        ["context at a decode step", f"{context:,.0f}", f"{context:,.0f}"],
        [
            "attended to exactly",
            f"{context:,.0f} (100%)",
            f"{attended:,.0f} ({100 * attended / context:.0f}%)",
        ],
        ["first token", *of_each(lambda r: f"{r.first_token_s:.1f} s")],
        ["  asked again", *of_each(lambda r: f"{r.cached_first_token_s:.2f} s")],
        [
            "time a token",
            f"{dense.ms_per_token:.1f} ms",
            f"{sparse.ms_per_token:.1f} ms ({speed_up:.2f}x)",
        ],
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for i, row in enumerate(rows):
        print(
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            )
        )
        if i == 0:
            print("  ".join("-" * width for width in widths))
    print("\nDecode steps of clusterkv (tokens attended to exactly, of the context):")
    for step in range(0, len(sparse.context), max(1, len(sparse.context) // 8)):
        share = sparse.attended[step] / sparse.context[step]
        print(
            f"  step {step + 1:3}  {sparse.attended[step]:5.0f} of "
            f"{sparse.context[step]:5}  {'#' * round(40 * share):<40}|"
        )
    print(
        "\nThe count is the mean over layers and KV heads: the budget, 16 attention "
        "sinks and the\npage being filled (up to 256 tokens). Clusters left out are "
        "stood in for by their means."
    )


if __name__ == "__main__":
    sys.exit(main())
