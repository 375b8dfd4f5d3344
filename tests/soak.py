# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Requests of random life, through an engine whose pages move to the host.

    python -m tests.soak --model DIR --requests 2000 --seed 0

Random lengths, arrivals, aborts and preemptions, at a covering budget; each answer is
held against dense attention's on the same engine type without the tier. On a GPU in
fp16, with CUDA graphs and asynchronous scheduling, where answers go on as dense
attention's did (trace replay) and log-probabilities are compared. Prints requests run,
mismatches and leaks, and ends with 1 if there is any.
"""

import argparse
import json
import os
import random
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

from tests.support.engine import (
    as_generated,
    clusterkv,
    engine,
    generate,
    poison,
    sampling,
)
from tests.support.engine_jobs import (
    CAPTURE_SIZES,
    EAGER,
    GARBAGE,
    SMALL_ENGINE,
    decode_graphs,
)
from tests.support.prompts import encode_text, find_model

MAX_MODEL_LEN, MAX_TOKENS = 1536, 40
ON_GPU = torch.cuda.is_available()
LOGPROB_TOLERANCE = 0.1 if ON_GPU else 1e-3
"""Nats; ``e2e_gpu/conftest.py`` has what rounding makes in fp16."""


def make_prompts(tokenizer, num: int, rng: random.Random) -> list[list[int]]:
    """Prompts of 1 to 1,400 tokens; some begin alike."""
    text = encode_text(tokenizer)
    prompts = []
    for _ in range(num):
        length = rng.choice([rng.randint(1, 300), rng.randint(700, 1400)])
        start = rng.choice([0, rng.randrange(len(text) - length)])
        prompts.append(text[start : start + length])
    return prompts


def leaks(llm, num_blocks: int) -> dict[str, int]:
    """What is held that no request holds."""
    for _ in range(3):
        llm.llm_engine.step()
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    counts = scheduler.connector._decisions.books.counts()
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return {
        "blocks": num_blocks - 1 - free,
        "host_pages": scheduler.connector._num_host_pages - counts.num_free_host_pages,
        "slots": counts.num_slots,
        "transfers": counts.num_copying,
    }


def live(llm, prompts, answers, num_requests: int, rng: random.Random) -> dict:
    """Runs the requests; a dict of what happened."""
    core = llm.llm_engine
    running: dict[str, int] = {}
    report = {"finished": 0, "aborted": 0, "resets": 0, "mismatches": 0}
    added = 0
    while added < num_requests or core.has_unfinished_requests():
        if added < num_requests and rng.random() < 0.3:
            running[str(added)] = i = rng.randrange(len(prompts))
            trace = answers[i].token_ids if ON_GPU else None
            core.add_request(
                str(added),
                {"prompt_token_ids": prompts[i]},
                sampling(MAX_TOKENS, trace),
            )
            added += 1
        if running and rng.random() < 0.01:
            victim = rng.choice(sorted(running))
            core.abort_request([victim])
            del running[victim]
            report["aborted"] += 1
        if rng.random() < 0.002:
            assert core.reset_prefix_cache(reset_running_requests=True)
            report["resets"] += 1
        for output in core.step():
            if not output.finished or output.request_id not in running:
                continue
            expected = answers[running.pop(output.request_id)]
            report["finished"] += 1
            report["mismatches"] += not is_equal(as_generated(output), expected)
            if report["finished"] % 100 == 0:
                print(json.dumps(report), file=sys.stderr, flush=True)
    return report


def is_equal(actual, expected) -> bool:
    gaps = [abs(a - e) for a, e in zip(actual.logprobs, expected.logprobs, strict=True)]
    return actual.token_ids == expected.token_ids and max(gaps) <= LOGPROB_TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="default .models/SmolLM2...")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=24, help="different ones")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hot-cache-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, rng = args.model or find_model(), random.Random(args.seed)
    sizes = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 2048}
    eager, graphs = {}, {}
    if ON_GPU:
        sizes = SMALL_ENGINE | sizes
        eager, graphs = EAGER, decode_graphs(*CAPTURE_SIZES)
    with engine(model, **sizes | eager) as llm:
        prompts = make_prompts(llm.get_tokenizer(), args.prompts, rng)
        answers = generate(llm, prompts, MAX_TOKENS)
    settings = {
        "token_budget": 2048,
        "min_sparse_len": 0,
        "host_memory_gib": 0.5,
        "hot_cache_tokens": args.hot_cache_tokens,
    }
    with engine(
        model,
        **sizes | graphs,
        num_gpu_blocks_override=args.blocks,
        **clusterkv(**settings, poison_released=True),
    ) as llm:
        poison(llm, rows=GARBAGE) if ON_GPU else poison(llm)
        start = time.monotonic()
        report = live(llm, prompts, answers, args.requests, rng)
        report["seconds"] = round(time.monotonic() - start)
        report["leaks"] = leaks(llm, args.blocks)
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        counts = scheduler.connector._decisions.books.counts()
        report["pages_copied"] = counts.total_copied
        report["pages_released"] = counts.total_released
        report["copies_late"] = counts.total_late
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        report["preemptions"] = metrics["vllm:num_preemptions"]
    print(json.dumps(report, indent=2))
    sys.exit(bool(report["mismatches"] or any(report["leaks"].values())))


if __name__ == "__main__":
    main()
