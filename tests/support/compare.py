# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The tolerance rule: a kernel may err twice as much as PyTorch in the same dtype."""

import torch

_ORDER = 8 * torch.finfo(torch.float32).eps  # fp32 sums in another order, fast exp


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, same_dtype: torch.Tensor
) -> None:
    """Holds a result against the fp32 reference, by flash-attention's rule.

    Args:
        actual: The op's result, on any device.
        expected: The reference's, in fp32.
        same_dtype: The same maths by PyTorch in the dtype that ``actual`` must have.
    """
    assert actual.shape == expected.shape == same_dtype.shape
    assert actual.dtype == same_dtype.dtype
    actual, expected = actual.detach().cpu(), expected.cpu()
    for name in ("isnan", "isposinf", "isneginf"):
        where, there = getattr(actual, name)(), getattr(expected, name)()
        assert torch.equal(where, there), f"{name} differs"
    finite = expected.isfinite()
    if not finite.any():
        return
    expected = expected[finite]
    rounded = expected.to(actual.dtype)
    rounding = _max_abs(rounded + 0.3 - 0.3 - rounded) + _ORDER * _max_abs(expected)
    bound = 2 * _max_abs(same_dtype.cpu()[finite] - expected) + 2 * rounding
    error = _max_abs(actual[finite] - expected)
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal byte by byte, NaNs too."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if actual.device != expected.device:
        actual, expected = actual.cpu(), expected.cpu()
    # A copy: a single element counts as contiguous whatever its stride.
    actual, expected = (
        t.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        for t in (actual, expected)
    )
    assert torch.equal(actual, expected)


def _max_abs(tensor: torch.Tensor) -> float:
    return tensor.float().abs().max().item()
