# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Prompts of token ids with their answers, fitted to a number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CLOSE_ENOUGH = 0.01
"""A prompt this share shorter than allowed is not made longer."""


@dataclass(frozen=True)
class Sample:
    """A prompt and what its answer must hold.

    Attributes:
        task: Name.
        context_len: Tokens of the prompt and of the answer together, at most.
        index: Of the sample in its task.
        prompt: Token ids.
        answers: What the scoring looks for.
        max_tokens: Of the answer.
        metric: Name of a function in ``scoring.METRICS``.
        labels: More to record, as a needle's depth.
    """

    task: str
    context_len: int
    index: int
    prompt: list[int]
    answers: list[str]
    max_tokens: int
    metric: str = "match_all"
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """What a task asks, before the tokenizer.

    Attributes:
        text: The user's.
        answer_prefix: How the model's answer begins.
        answers: What it must hold.
    """

    text: str
    answer_prefix: str
    answers: list[str]


class Prompter:
    """Makes prompts with a model's tokenizer, and its chat template if it has one."""

    def __init__(self, tokenizer) -> None:
        """Args:
        tokenizer: Of transformers.
        """
        self.tokenizer = tokenizer
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))

    def encode(
        self, text: str, answer_prefix: str = "", chat: bool = True
    ) -> list[int]:
        """Token ids of a message.

        Args:
            text: The user's.
            answer_prefix: Put behind it, in the assistant's turn.
            chat: Whether to use the chat template, if there is one.
        """
        if not (chat and self.has_chat_template):
            return self.tokenizer.encode(text + answer_prefix)
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=False,
        )
        # The template has its special tokens written out.
        return self.tokenizer.encode(
            rendered + answer_prefix.lstrip(), add_special_tokens=False
        )

    def decode(self, token_ids: list[int]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def fit(
        self, build: Callable[[int], Message], max_tokens: int, task: str
    ) -> tuple[list[int], Message]:
        """The longest prompt that does not exceed a length, but for a percent.

        Args:
            build: Makes the message of an amount of filler, from 0 on. Must be
                deterministic, and longer the larger the amount.
            max_tokens: Of the prompt.
            task: For the error's text.

        Returns:
            prompt: Token ids.
            message: What it was made of.

        Raises:
            ValueError: Even without filler the prompt is too long.
        """

        def measure(amount: int) -> tuple[list[int], Message]:
            message = build(amount)
            return self.encode(message.text, message.answer_prefix), message

        low, high = 0, 0
        best = measure(0)
        empty = len(best[0])
        if empty > max_tokens:
            raise ValueError(
                f"--context-lens: {task} needs prompts of at least {empty} tokens with "
                f"this tokenizer, got room for {max_tokens}"
            )
        guess, bisect = 16, False
        while not high or high - low > 1:
            found = measure(guess)
            room = high - low if high else 0
            if len(found[0]) <= max_tokens:
                low, best = guess, found
                if len(best[0]) >= max_tokens * (1 - CLOSE_ENOUGH):
                    break
            else:
                high = guess
            if bisect:
                guess = (low + high) // 2
            else:
                a_unit = max((len(found[0]) - empty) / guess, 1e-3)
                # Aimed a little low, since only lengths below the limit will do.
                guess = int((max_tokens * (1 - CLOSE_ENOUGH / 2) - empty) / a_unit)
                guess = min(max(guess, low + 1), high - 1 if high else 4 * low + 16)
            # A word of very many tokens lets the guesses crawl from both sides.
            bisect = bool(room) and 2 * (high - low) > room and not bisect
        return best
