# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Eight layers of Llama-3.1-8B, random weights, 32k tokens: as near to FLASH_ATTN as
FLASH_ATTN to itself.

With random weights, rounding grows from layer to layer, to no known size. So it is
measured: FLASH_ATTN replays its own tokens with prompts in steps of 256 tokens instead
of 8192, and one request at a time. That changes the shapes that cuBLAS sees and the
splits of attention, in prefill and decode, and nothing else. The backend must be within
three times that, since it also sums in another order (in prefill too: pages are sorted)
and with splits of its own. The allowance is not too wide: without one page of 128 the
same comparison fails.

Needs a folder with the model's config.json in CLUSTERKV_TEST_LLAMA, and 24 GiB of GPU
memory.
"""

import os
from dataclasses import replace

import pytest
import torch

from tests.support.engine import clusterkv
from tests.support.engine_jobs import (
    EngineProcess,
    Round,
    decode_graphs,
    draw_weights,
    run_rounds,
    run_without_page,
)
from tests.support.logprobs import assert_near, difference

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]

# The first completes a page of generated tokens.
LENGTHS, NUM_TOKENS = (32_760, 32_000), 24

ENGINE = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "hf_overrides": {"num_hidden_layers": 8},
    "dtype": "float16",
    "enforce_eager": False,
    "enable_trace_replay": True,
    "async_scheduling": False,
    "max_model_len": 33_024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.3,
    **decode_graphs(1, 2, 4),
}

NOISE_FACTOR = 3

MIN_ALLOWANCE = (0.02, 0.005)
"""Nats, at most and on average, however small the noise."""


@pytest.fixture(scope="module")
def llama() -> str:
    path = os.environ.get("CLUSTERKV_TEST_LLAMA")
    if not path:
        pytest.skip("CLUSTERKV_TEST_LLAMA is not set")
    return path


@pytest.fixture(scope="module")
def batch() -> Round:
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(100, 100_000, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]
    return Round(prompts, NUM_TOKENS)


def test_32k_tokens_at_a_covering_budget(llama, batch):
    with EngineProcess(llama, attention_backend="FLASH_ATTN", **ENGINE) as engine:
        engine.submit(draw_weights)()
        dense = engine.submit(run_rounds, {"batch": batch})().rounds["batch"]
        batch = replace(batch, traces=[answer.token_ids for answer in dense])
        otherwise = replace(batch, one_by_one=True, forget=True, tokens_a_step=256)
        repeated = engine.submit(run_rounds, {"": otherwise})().rounds[""]
    noise = difference(repeated, dense)
    allowed = [
        max(NOISE_FACTOR * measured, least)
        for measured, least in zip(noise, MIN_ALLOWANCE, strict=True)
    ]

    covering = clusterkv(token_budget=2**20, min_sparse_len=0)
    # In a process of its own, and not beside the first: vLLM measures the memory that
    # is left, with a small KV cache that it then replaces.
    with EngineProcess(llama, **covering, **ENGINE) as engine:
        engine.submit(draw_weights)()
        sparse = engine.submit(run_rounds, {"batch": batch})
        without_page = engine.submit(run_without_page, batch, 64)
    assert 2 in sparse().full_replays["batch"]
    assert_near(sparse().rounds["batch"], dense, *allowed)
    with pytest.raises(AssertionError, match="log-probabilities differ"):
        assert_near(without_page(), dense, *allowed)
