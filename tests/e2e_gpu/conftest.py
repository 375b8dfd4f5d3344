# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A real vLLM on a real language model, on a GPU.

vLLM's FLASH_ATTN generates greedily; the backend under test then goes on with those
tokens, whatever it finds likeliest (vLLM's trace replay), so that every decode step
can be compared: the log-probabilities of the tokens must be near.

The model runs in fp16. There, two correct attentions differ by rounding: on the CPU,
over these prompts, by up to 0.010 nats a token and 0.0024 on average (in bf16 0.11 and
0.018). The tolerances are five times that. A page left out, or read in a wrong
order of tokens, costs tenths of nats.

Most of the time goes into starting engines. So all of them start side by side and
generate for all tests, before the first test; the tests compare.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests.support.engine import NUM_TOKENS, clusterkv
from tests.support.engine_jobs import (
    CAPTURE_SIZES,
    CHUNK,
    COVERING,
    EAGER,
    GRAPHS,
    SMALL_BUDGET,
    SMALL_ENGINE,
    EngineProcess,
    Outcome,
    Round,
    decode_graphs,
    run_rounds,
    run_with_few_pages,
    run_with_host_tier,
)
from tests.support.prompts import make_prompts, needle_prompt

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ENGINES = {
    "dense": {
        "attention_backend": "FLASH_ATTN",
        "max_num_batched_tokens": 4096,
        **EAGER,
    },
    "graphs": COVERING | GRAPHS,
    "eager": COVERING | EAGER,
    "small graphs": SMALL_BUDGET | decode_graphs(*CAPTURE_SIZES),
    "small eager": SMALL_BUDGET | EAGER,
    "default": CHUNK | clusterkv() | decode_graphs(1, 8, 16),
    # Eight pages: the first block is vLLM's own.
    "few pages": COVERING
    | decode_graphs(1, 2, 4)
    | {
        "max_model_len": 1024,
        "num_gpu_blocks_override": 9,
        "async_scheduling": False,
    },
}

HOST_TIER = {
    "token_budget": 4096,
    "min_sparse_len": 0,
    "host_memory_gib": 1,
    "poison_released": True,
}
for mode, hot_cache_tokens, args in (
    ("graphs", 256, decode_graphs(1, 2, 4, 8)),
    ("eager", 0, EAGER),
):
    # Three of five requests of eight pages each.
    ENGINES[f"host tier, {mode}"] = (
        CHUNK
        | clusterkv(**HOST_TIER, hot_cache_tokens=hot_cache_tokens)
        | args
        | {"max_model_len": 2560, "num_gpu_blocks_override": 28}
    )

# Enough for all 64 prompts to be computed, 600 tokens a step, before the first ends.
MAX_TOKENS = {"full_batch": 64, "page_end": 40, "moving": 60}


@pytest.fixture(scope="session")
def prompts(text_ids):
    """Prompts by name; every list is one batch, in this order."""
    named = make_prompts(text_ids)
    [shared] = named["shared"]
    # With five pages in the cache, one token is left to compute: a row of a FULL
    # graph that still has prompt to compute.
    named["last_token"] = [shared[:1281]]
    # The graph of 64 rows, most of which fill a page while they decode or before.
    named["full_batch"] = [text_ids[350 * i : 350 * i + 60 + 13 * i] for i in range(64)]
    # Fills its first page while it decodes.
    named["page_end"] = [text_ids[:240]]
    named["moving"] = [text_ids[2100 * i : 2100 * i + 1900 + 30 * i] for i in range(5)]
    return named


@pytest.fixture(scope="session")
def needles(tokenizer, text_ids):
    """Prompts that ask for a fact hidden in them."""
    return [needle_prompt(tokenizer, text_ids, at) for at in (0.1, 0.5, 0.9)]


@pytest.fixture(scope="session")
def outcome(model_path, prompts, needles) -> Callable[[str], Outcome]:
    """What an engine generated, by the name that it has in ``ENGINES``."""
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                EngineProcess(model_path, **SMALL_ENGINE | engine_args)
            )
            for name, engine_args in ENGINES.items()
        }
        rounds = {
            name: Round(batch, MAX_TOKENS.get(name, NUM_TOKENS))
            for name, batch in prompts.items()
        }
        get = {"dense": engines["dense"].submit(run_rounds, rounds)}
        traces = {
            name: [answer.token_ids for answer in answers]
            for name, answers in get["dense"]().rounds.items()
        }
        # To go on as FLASH_ATTN did.
        replays = {name: replace(rounds[name], traces=traces[name]) for name in rounds}
        page_end, moving = replays.pop("page_end"), replays.pop("moving")
        for name in ("host tier, graphs", "host tier, eager"):
            get[name] = engines[name].submit(run_with_host_tier, moving)
        get["few pages"] = engines["few pages"].submit(
            run_with_few_pages, replays["crowd"], page_end
        )
        batch = replays["full_batch"]
        alone = replace(
            batch,
            prompts=batch.prompts[::16],
            traces=batch.traces[::16],
            one_by_one=True,
            forget=True,
        )
        both = {name: replays[name] for name in ("long", "full_batch")}
        again = {f"{name} again": replace(both[name], forget=True) for name in both}
        for name, plan in {
            "graphs": replays | {"alone": alone},
            "eager": replays | {"alone": alone},
            "small graphs": both | again | {"needles": Round(needles, 16)},
            "small eager": both,
            "default": {name: replays[name] for name in ("ragged", "crowd")},
        }.items():
            get[name] = engines[name].submit(run_rounds, plan)
    # The processes have ended. A failure of one is that of the tests which ask for it.
    return lambda name: get[name]()
