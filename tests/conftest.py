# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The ``device`` fixture: every op test is written once and runs on each device."""

import pytest
import torch

_DEVICES = ["cpu"]
if torch.cuda.is_available():
    _DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=_DEVICES)
def device(request) -> str:
    """A device that the ops have kernels for."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread(request):
    """Runs PyTorch on one thread: inputs are so small that more would only wait."""
    if request.node.get_closest_marker("e2e"):
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def pytest_report_header() -> str:
    gpu = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    )
    return f"clusterkv: torch {torch.__version__}, {gpu}"
