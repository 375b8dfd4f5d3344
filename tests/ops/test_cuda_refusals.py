# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What CUDA has no kernels for is refused by a message that says what it has."""

import pytest
import torch

from tests.support import cases
from tests.support.inputs import make_decode_inputs
from vllm_clusterkv import ops

pytestmark = pytest.mark.gpu

FP32_PAGES = cases.DecodeCase((257,), cases.FP32)
SIZE_80 = cases.DecodeCase((257,), head_size=80)
GROUP_OF_17 = cases.DecodeCase((257,), num_kv_heads=1, group=17)

DTYPE = r"kv_cache must have dtype BFloat16 or Half on CUDA, got Float"
HEAD_SIZE = r"head_size must be 64, 96, 128 or 256 on CUDA, got 80"
GROUP = r"num_heads / num_kv_heads must be at most 16 on CUDA, got 17"


def arguments(inputs):
    """Valid arguments of every op, by its name."""
    score = inputs.score_args()
    select = inputs.select_args(score["scores"], 100)
    block_ids = inputs.block_table[0, :1].contiguous()
    index = {
        **inputs.pages.args(),
        "block_ids": block_ids,
        "num_sink_tokens": torch.zeros_like(block_ids),
        "num_iters": 2,
    }
    return {
        "index_pages": index,
        "score_clusters": score,
        "select_clusters": select,
        "sparse_decode": inputs.decode_args(score["scores"], select["selected"]),
    }


@pytest.mark.parametrize(
    ("name", "case", "message"),
    [
        ("index_pages", FP32_PAGES, DTYPE),
        ("index_pages", SIZE_80, HEAD_SIZE),
        ("score_clusters", FP32_PAGES, DTYPE),
        ("score_clusters", SIZE_80, HEAD_SIZE),
        ("score_clusters", GROUP_OF_17, GROUP),
        ("sparse_decode", FP32_PAGES, DTYPE),
        ("sparse_decode", SIZE_80, HEAD_SIZE),
        ("sparse_decode", GROUP_OF_17, GROUP),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_refused(name, case, message):
    args = arguments(make_decode_inputs(case).to("cuda"))[name]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(**args)


def one_element_off(tensor):
    """A contiguous copy whose first element is the second of its memory."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    ("name", "argument", "num_bytes"),
    [
        ("score_clusters", "softmax_sums", 8),
        ("select_clusters", "scores", 16),
        ("select_clusters", "softmax_sums", 8),
        ("select_clusters", "selected", 4),
        ("sparse_decode", "selected", 4),
        ("sparse_decode", "workspace", 8),
    ],
)
def test_what_is_not_aligned_is_refused(name, argument, num_bytes):
    args = arguments(make_decode_inputs(cases.DecodeCase((257, 300))).to("cuda"))[name]
    args[argument] = one_element_off(args[argument])
    message = rf"{name}: {argument} must be aligned to {num_bytes} bytes"
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(**args)


@pytest.mark.parametrize(
    "name", ["index_pages", "score_clusters", "select_clusters", "sparse_decode"]
)
def test_every_tensor_is_on_one_device(name):
    args = arguments(make_decode_inputs(cases.DecodeCase((257, 300))).to("cuda"))[name]
    tensors = [key for key, value in args.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 4
    for argument in tensors:
        message = rf"{argument} must be on the device of kv_cache \(cuda:0\), got cpu"
        if argument == "kv_cache":  # then the first other one is named
            message = r"must be on the device of kv_cache \(cpu\), got cuda:0"
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, name)(**{**args, argument: args[argument].cpu()})
