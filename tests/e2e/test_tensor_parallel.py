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


def run(model, prompt_lengths=PROMPT_LENGTHS, check=None, **kwargs):
    """What is generated; ``check`` sees the engine behind it."""
    from vllm import LLM

    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(512, (length,), generator=generator).tolist()
        for length in prompt_lengths
    ]
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1536,
        enforce_eager=True,
        **kwargs,
    )
    try:
        generated = generate(llm, prompts, NUM_TOKENS)
        if check is not None:
            check(llm)
        return generated
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    # By default vLLM wants a NUMA node a rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_two_ranks_equal_one_dense_rank(random_llama):
    dense = run(random_llama)
    sharded = run(
        random_llama,
        tensor_parallel_size=2,
        **clusterkv(token_budget=1024, min_sparse_len=0),
    )
    assert_equal(sharded, dense)


def test_two_ranks_with_a_host_tier(random_llama, monkeypatch):
    """Three requests of six pages in eighteen blocks: pages move on both ranks."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the scheduler is here

    def pages_moved(llm):
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        counts = scheduler.connector._decisions.books.counts()
        assert counts.total_released >= 2 and counts.num_slots == 0

    lengths = [1500, 1400, 1300]
    dense = run(random_llama, lengths)
    sharded = run(
        random_llama,
        lengths,
        pages_moved,
        tensor_parallel_size=2,
        num_gpu_blocks_override=19,
        **clusterkv(
            token_budget=2048,
            min_sparse_len=0,
            host_memory_gib=0.02,
            hot_cache_tokens=256,
            poison_released=True,
        ),
    )
    assert_equal(sharded, dense)
