# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Prompts of English text, as token ids, for the tests on a real model."""

import os
import pydoc_data.topics
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


def find_model() -> str:
    """Folder of SmolLM2-135M-Instruct."""
    path = Path(
        os.environ.get("CLUSTERKV_TEST_MODEL", REPO / ".models/SmolLM2-135M-Instruct")
    )
    if not (path / "config.json").exists():
        pytest.fail(f"no model in {path}: run `make model`")
    return str(path)


def encode_text(tokenizer) -> list[int]:
    """About 30k tokens of English: the Python language reference."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    return tokenizer.encode(text[:120_000])


def make_prompts(text_ids: list[int]) -> dict[str, list[list[int]]]:
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


def needle_prompt(tokenizer, text_ids: list[int], position: float) -> list[int]:
    """3,000 tokens of text with a fact at a share of the way, and its question.

    The answer is 7421.
    """
    fact = tokenizer.encode("\n\nThe secret number of the lighthouse is 7421.\n\n")
    question = tokenizer.encode(
        "\n\nQuestion: What is the secret number of the lighthouse?\n"
        "Answer: The secret number of the lighthouse is"
    )
    at = int(3000 * position)
    return text_ids[:at] + fact + text_ids[at:3000] + question
