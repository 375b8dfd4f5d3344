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
"""

import os

import pytest

from tests.support.engine import NUM_TOKENS
from tests.support.engine_jobs import EAGER, Round, in_own_process, run_rounds
from tests.support.prompts import encode_text, find_model, make_prompts

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of SmolLM2-135M-Instruct."""
    return find_model()


@pytest.fixture(scope="session")
def tokenizer(model_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="session")
def text_ids(tokenizer) -> list[int]:
    """About 30k tokens of English."""
    return encode_text(tokenizer)


@pytest.fixture(scope="session")
def prompts(text_ids):
    """Prompts by name; every list is one batch, in this order."""
    named = make_prompts(text_ids)
    [shared] = named["shared"]
    # With five pages in the cache, one token is left to compute: a row of a FULL
    # graph that still has prompt to compute.
    named["last_token"] = [shared[:1281]]
    # The graph of 64 rows, most of which fill a page while they decode or before.
    named["full_batch"] = [text_ids[350 * i : 350 * i + 60 + 19 * i] for i in range(64)]
    return named


@pytest.fixture(scope="session")
def dense(model_path, prompts, text_ids):
    """What FLASH_ATTN generates."""
    return in_own_process(
        run_rounds,
        model_path,
        {name: Round(batch, NUM_TOKENS) for name, batch in prompts.items()},
        twins=(text_ids[:240], None),
        attention_backend="FLASH_ATTN",
        max_num_batched_tokens=4096,
        async_scheduling=False,
        **EAGER,
    )


@pytest.fixture(scope="session")
def replays(prompts, dense):
    """The same prompts, to go on as FLASH_ATTN did."""
    return {
        name: Round(
            batch, NUM_TOKENS, [answer.token_ids for answer in dense.rounds[name]]
        )
        for name, batch in prompts.items()
    }
