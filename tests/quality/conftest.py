# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A tokenizer without a model, and its prompter; a tiny model, and texts for it."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A tiny model with random weights and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(127)} | {"?": 127}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text_folder(tmp_path):
    """Texts of the words that the tiny model's tokenizer knows."""
    folder = tmp_path / "texts"
    folder.mkdir()
    numbers = torch.randint(127, (4000,), generator=torch.Generator().manual_seed(0))
    for name, part in {"b": numbers[2000:], "a": numbers[:2000]}.items():
        text = " ".join(f"w{i}" for i in part.tolist())
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder
