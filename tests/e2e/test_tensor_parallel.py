# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Two ranks, each with its own KV heads and index, give what one dense rank gives.

SmolLM2's three KV heads cannot be split, so this is a Llama of random weights with
two. Ranks are spawned processes.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.engine import assert_equal, clusterkv, generate

PROMPT_LENGTHS = [700, 250, 300]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("random-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=512,
        max_position_embeddings=2048,
        # Peaked attention and logits: greedy choices that rounding cannot turn.
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def run(model, **kwargs):
    from vllm import LLM

    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(512, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        **kwargs,
    )
    try:
        return generate(llm, prompts, NUM_TOKENS)
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_two_ranks_equal_one_dense_rank(random_llama, monkeypatch):
    # By default vLLM wants a NUMA node a rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dense = run(random_llama)
    sharded = run(
        random_llama,
        tensor_parallel_size=2,
        **clusterkv(token_budget=1024, min_sparse_len=0),
    )
    assert_equal(sharded, dense)
