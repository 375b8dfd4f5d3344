# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Which pages a step completes, and indexing them a step later in all layers."""

import numpy as np
import pytest
import torch

from vllm_clusterkv import indexing, ops
from vllm_clusterkv.backend import CompletedPages
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.indexing import DeferredIndexing, completed_pages, span_layers
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout

LAYOUT = PageLayout(num_kv_heads=2, head_size=16, num_clusters=16, dtype=torch.bfloat16)
NUM_BLOCKS = 5


@pytest.mark.parametrize(
    "computed, seq_lens, expected",
    [
        ([], [], []),
        ([0], [255], []),
        ([0], [256], [(0, 0)]),
        ([255], [256], [(0, 0)]),
        ([256], [257], []),
        ([100], [1024], [(0, 0), (0, 1), (0, 2), (0, 3)]),
        (
            [511, 300, 255, 256],
            [512, 301, 700, 768],
            [(0, 1), (2, 0), (2, 1), (3, 1), (3, 2)],
        ),
        # Padding rows.
        ([511, 0, 0], [512, 0, 0], [(0, 1)]),
    ],
)
def test_completed_pages(computed, seq_lens, expected):
    rows, pages = completed_pages(
        np.array(computed, dtype=np.int32), np.array(seq_lens, dtype=np.int32)
    )
    assert list(zip(rows.tolist(), pages.tolist(), strict=True)) == expected


def test_completed_pages_of_random_batches():
    rng = np.random.default_rng(0)
    for _ in range(50):
        computed = rng.integers(0, 2000, size=rng.integers(1, 20))
        seq_lens = computed + rng.integers(0, 900, size=len(computed))
        rows, pages = completed_pages(computed, seq_lens)
        assert list(zip(rows.tolist(), pages.tolist(), strict=True)) == [
            (row, page)
            for row in range(len(computed))
            for page in range(10_000 // BLOCK_SIZE)
            if computed[row] < (page + 1) * BLOCK_SIZE <= seq_lens[row]
        ]


def make_layers(layer_strides, block_stride):
    """Views of layers as vLLM makes them, at distances in pages, in one buffer."""
    element_bytes = LAYOUT.dtype.itemsize
    end = max(layer_strides) + NUM_BLOCKS * block_stride
    buffer = torch.zeros(end * LAYOUT.page_bytes, dtype=torch.int8)
    row = 2 * LAYOUT.head_size
    page_size = LAYOUT.page_bytes // element_bytes
    return [
        buffer.view(LAYOUT.dtype).as_strided(
            (NUM_BLOCKS, LAYOUT.num_kv_heads, BLOCK_SIZE, row),
            (block_stride * page_size, BLOCK_SIZE * row, row, 1),
            stride * page_size,
        )
        for stride in layer_strides
    ]


@pytest.mark.parametrize(
    "layer_strides, block_stride, num_spans",
    [
        ([0, NUM_BLOCKS, 2 * NUM_BLOCKS], 1, 1),
        # Layers not in the order of their addresses, and with a gap.
        ([3 * NUM_BLOCKS, 0, NUM_BLOCKS], 1, 1),
        # One layer.
        ([0], 1, 1),
        # Layers within each block, as in the layouts that begin with B.
        ([0, 1, 2], 3, 3),
    ],
)
def test_layers_are_indexed_a_step_later(layer_strides, block_stride, num_spans):
    generator = torch.Generator().manual_seed(0)
    layers = make_layers(layer_strides, block_stride)
    expected = make_layers(layer_strides, block_stride)
    for layer, copy in zip(layers, expected, strict=True):
        layer.copy_(torch.randn(layer.shape, generator=generator))
        copy.copy_(layer)
    block_ids = torch.tensor([3, 0], dtype=torch.int32)
    num_sink_tokens = torch.tensor([16, 0], dtype=torch.int32)
    config = ClusterKVConfig(num_iters=2)

    spans = span_layers(layers, LAYOUT)
    assert len(spans) == num_spans
    step = DeferredIndexing()
    step.run(spans, config)
    step.defer(CompletedPages(block_ids, num_sink_tokens))
    assert all(map(torch.equal, layers, expected))
    step.run(spans, config)
    for layer, copy in zip(layers, expected, strict=True):
        index = LAYOUT.index_view(copy)
        ops.index_pages(copy, index, block_ids, num_sink_tokens, config.num_iters)
        assert torch.equal(layer, copy)
        assert torch.equal(LAYOUT.index_view(layer), index)
    # Nothing is left to do.
    step.defer(None)
    step.run(spans, config)
    assert all(map(torch.equal, layers, expected))


def test_layers_in_one_span_take_one_launch(monkeypatch):
    calls = []
    monkeypatch.setattr(
        indexing,
        "index_completed_pages",
        lambda pages, completed, config: calls.append(completed),
    )
    spans = span_layers(make_layers([0, NUM_BLOCKS], 1), LAYOUT)
    step = DeferredIndexing()
    step.defer(CompletedPages(torch.tensor([4, 1]), torch.tensor([16, 0])))
    step.run(spans, ClusterKVConfig())
    [completed] = calls
    assert completed.block_ids.tolist() == [4, 1, NUM_BLOCKS + 4, NUM_BLOCKS + 1]
    assert completed.num_sink_tokens.tolist() == [16, 0, 16, 0]
