# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Are the log-probabilities of the same tokens near?"""

import torch

from tests.support.engine import Generated

MAX_DIFFERENCE = 0.05
"""Nats, of a token, in fp16 (``tests/e2e_gpu/conftest.py`` says why)."""

MEAN_DIFFERENCE = 0.01
"""Nats, over all tokens."""


def assert_near(
    actual: list[Generated],
    expected: list[Generated],
    max_difference: float = MAX_DIFFERENCE,
    mean_difference: float = MEAN_DIFFERENCE,
) -> None:
    """Equal tokens, whose log-probabilities are near."""
    assert [a.token_ids for a in actual] == [e.token_ids for e in expected]
    differences = torch.tensor([a.logprobs for a in actual]) - torch.tensor(
        [e.logprobs for e in expected]
    )
    differences = differences.abs()  # [num_requests, num_tokens]
    worst, mean = float(differences.max()), float(differences.mean())
    request, step = divmod(int(differences.argmax()), differences.shape[1])
    # Not "worst > ...": a NaN must fail.
    assert worst <= max_difference and mean <= mean_difference, (
        f"log-probabilities differ by up to {worst:.4f} nats (request {request}, "
        f"token {step}), by {mean:.4f} on average; allowed are {max_difference} and "
        f"{mean_difference}"
    )
