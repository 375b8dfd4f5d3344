# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The ``device`` fixture: every op test is written once and runs on each device. The
model and its text, for the tests that start vLLM."""

import pytest
import torch

from tests.support import cases
from tests.support.prompts import encode_text, find_model

_DEVICES = ["cpu"]
if torch.cuda.is_available():
    _DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=_DEVICES)
def device(request) -> str:
    """A device that the ops have kernels for."""
    return request.param


def pytest_collection_modifyitems(config, items) -> None:
    """Leaves out what does not exist: CUDA tests without a device, and op cases that
    CUDA has no kernels for. Their refusal has a test of its own."""
    dropped = [item for item in items if not _exists(item)]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


def _exists(item) -> bool:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return False
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if params.get("device") != "cuda":
        return True
    case = params.get("case")
    dtype = getattr(case, "dtype", params.get("dtype", cases.BF16))
    head_size = getattr(case, "head_size", params.get("head_size", 64))
    return dtype in cases.CUDA_DTYPES and head_size in cases.CUDA_HEAD_SIZES


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of SmolLM2-135M-Instruct."""
    return find_model()


@pytest.fixture(scope="session")
def tokenizer(model_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="session")
def text_ids(tokenizer) -> list[int]:
    """About 30k tokens of English."""
    return encode_text(tokenizer)


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
