# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A real vLLM on a real language model, for the tests of this folder.

Equality tests run in fp32: there the backends differ by 1e-5 nats, so greedy tokens
must be equal, and a wrong row cannot hide behind rounding.
"""

import os
import pydoc_data.topics
from pathlib import Path

import pytest

from tests.support.engine import NUM_TOKENS, engine, generate

# Read by vLLM when it is imported, so before any test module imports it.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPO = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("e2e")


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of SmolLM2-135M-Instruct."""
    path = Path(
        os.environ.get("CLUSTERKV_TEST_MODEL", REPO / ".models/SmolLM2-135M-Instruct")
    )
    if not (path / "config.json").exists():
        pytest.fail(f"no model in {path}: run `make model`")
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(model_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="session")
def text_ids(tokenizer) -> list[int]:
    """About 30k tokens of English: the Python language reference."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    return tokenizer.encode(text[:120_000])


@pytest.fixture(scope="session")
def prompts(text_ids):
    """Prompts by name; every list is one batch."""
    lengths = [1, 17, 255, 256, 257, 511, 513, 700, 1025]
    starts = range(0, 200 * len(lengths), 200)
    shared = text_ids[5000 : 5000 + 1300]
    return {
        "long": [text_ids[:2300]],
        "ragged": [
            text_ids[start : start + length]
            for start, length in zip(starts, lengths, strict=True)
        ],
        "shared": [shared],
        "shared_suffixes": [shared + text_ids[:100], shared + text_ids[300:340]],
        # 500 + 20 tokens: their third page comes in the middle of decoding.
        "crowd": [text_ids[start : start + 500] for start in (100, 900, 1700, 2500)],
    }


@pytest.fixture(scope="session")
def expected(model_path, prompts):
    """What vLLM's default CPU backend generates."""
    with engine(model_path, max_num_batched_tokens=4096) as llm:
        return {
            name: generate(llm, batch, NUM_TOKENS) for name, batch in prompts.items()
        }
