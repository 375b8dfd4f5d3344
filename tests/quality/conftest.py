# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A tokenizer without a model, and its prompter."""

import re

import pytest

from benchmarks.quality.samples import Prompter
from benchmarks.quality.texts import Texts, load_texts


class WordTokenizer:
    """Words, digits and marks are tokens; white space belongs to what follows it."""

    chat_template = "user and assistant"
    eos_token_id = 0

    def __init__(self) -> None:
        self._ids = {"<end>": 0}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        parts = re.findall(r"\s*(?:[A-Za-z]+|\d|[^\w\s]|_)|\s+", text)
        return [self._ids.setdefault(part, len(self._ids)) for part in parts]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        parts = list(self._ids)
        return "".join(parts[i] for i in token_ids if i or not skip_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt, tokenize) -> str:
        return f"<user>{messages[0]['content']}<assistant>"


@pytest.fixture
def prompter() -> Prompter:
    return Prompter(WordTokenizer())


@pytest.fixture(scope="session")
def texts() -> Texts:
    return load_texts(None)
