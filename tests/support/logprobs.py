# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Are the log-probabilities of the same tokens near?"""

import torch

from tests.support.engine import Generated

MAX_DIFFERENCE = 0.05
"""Nats, of a token, in fp16 (``tests/e2e_gpu/conftest.py`` says why)."""

MEAN_DIFFERENCE = 0.01
"""Nats, over all tokens."""


def difference(
    actual: list[Generated], expected: list[Generated]
) -> tuple[float, float]:
    """Nats between the log-probabilities of equal tokens: the most, and the mean."""
    differences = _differences(actual, expected)
    return float(differences.max()), float(differences.mean())


def assert_near(
    actual: list[Generated],
    expected: list[Generated],
    max_difference: float = MAX_DIFFERENCE,
    mean_difference: float = MEAN_DIFFERENCE,
) -> None:
    """Equal tokens, whose log-probabilities are near."""
    differences = _differences(actual, expected)
    worst, mean = float(differences.max()), float(differences.mean())
    request, step = divmod(int(differences.argmax()), differences.shape[1])
    # Not "worst > ...": a NaN must fail.
    assert worst <= max_difference and mean <= mean_difference, (
        f"log-probabilities differ by up to {worst:.4f} nats (request {request}, "
        f"token {step}), by {mean:.4f} on average; allowed are "
        f"{max_difference:.4f} and {mean_difference:.4f}"
    )


def _differences(actual: list[Generated], expected: list[Generated]) -> torch.Tensor:
    """[num_requests, num_tokens] absolute differences."""
    assert [a.token_ids for a in actual] == [e.token_ids for e in expected]
    logprobs = [torch.tensor([g.logprobs for g in side]) for side in (actual, expected)]
    return (logprobs[0] - logprobs[1]).abs()
