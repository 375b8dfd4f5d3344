# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A real vLLM on a real language model, for the tests of this folder.

Equality tests run in fp32: there the backends differ by 1e-5 nats, so greedy tokens
must be equal, and a wrong row cannot hide behind rounding.
"""

import os
from pathlib import Path

import pytest

from tests.support.engine import NUM_TOKENS, engine, generate
from tests.support.prompts import make_prompts

# Read by vLLM when it is imported, so before any test module imports it.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("e2e")


@pytest.fixture(scope="session")
def prompts(text_ids):
    """Prompts by name; every list is one batch."""
    return make_prompts(text_ids)


@pytest.fixture(scope="session")
def expected(model_path, prompts):
    """What vLLM's default CPU backend generates."""
    with engine(model_path, max_num_batched_tokens=4096) as llm:
        return {
            name: generate(llm, batch, NUM_TOKENS) for name, batch in prompts.items()
        }
