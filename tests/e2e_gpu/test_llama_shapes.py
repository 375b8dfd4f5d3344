# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Llama-3.1-8B with random weights at 32k tokens: as near to FLASH_ATTN as rounding.

Needs a folder with its config.json in CLUSTERKV_TEST_LLAMA, and about 30 GiB of GPU
memory.
"""

import os

import pytest
import torch

from tests.support.engine import clusterkv
from tests.support.engine_jobs import in_own_process, run_random_weights
from tests.support.logprobs import assert_near

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]

NUM_TOKENS = 16

ENGINE = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "max_model_len": 33_024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.5,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4],
    },
}


@pytest.fixture(scope="module")
def llama() -> str:
    path = os.environ.get("CLUSTERKV_TEST_LLAMA")
    if not path:
        pytest.skip("CLUSTERKV_TEST_LLAMA is not set")
    return path


def test_32k_tokens_at_a_covering_budget(llama):
    generator = torch.Generator().manual_seed(0)
    # The first completes a page of generated tokens.
    prompts = [
        torch.randint(100, 100_000, (length,), generator=generator).tolist()
        for length in (32_760, 32_000)
    ]
    dense = in_own_process(
        run_random_weights,
        llama,
        prompts,
        NUM_TOKENS,
        attention_backend="FLASH_ATTN",
        **ENGINE,
    )
    sparse = in_own_process(
        run_random_weights,
        llama,
        prompts,
        NUM_TOKENS,
        [answer.token_ids for answer in dense],
        **clusterkv(token_budget=2**20, min_sparse_len=0),
        **ENGINE,
    )
    # In bf16: eight times the rounding of fp16.
    assert_near(sparse, dense, max_difference=0.4, mean_difference=0.08)
