# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What the CUDA backend makes of vLLM's batches, with tensors on the CPU.

FlashAttention's builder is replaced: it takes what it is given.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_clusterkv import cuda_backend, indexing
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.cuda_backend import (
    ALWAYS_DENSE,
    ClusterKVCUDAMetadataBuilder,
    crossover_len,
    num_score_parts,
    num_splits,
)
from vllm_clusterkv.page_layout import PageLayout

LAYOUT = PageLayout(2, 64, ClusterKVConfig().num_clusters, torch.bfloat16)
NUM_BLOCKS, MAX_BLOCKS, MAX_REQS = 40, 8, 16
MIN_SPARSE_LEN = 300


class FakeFlashAttentionBuilder:
    def __init__(self, *args):
        pass

    def build(self, common_prefix_len, batch):
        assert self.use_full_cuda_graph is False
        return batch


@pytest.fixture
def indexed(monkeypatch):
    """Block ids and sinks of each launch so far."""
    launches = []

    def record(pages, completed, config):
        assert completed.block_ids.dtype == torch.int32
        assert completed.num_sink_tokens.dtype == torch.int32
        launches.append(
            (completed.block_ids.tolist(), completed.num_sink_tokens.tolist())
        )

    monkeypatch.setattr(indexing, "index_completed_pages", record)
    return launches


@pytest.fixture
def builder(monkeypatch):
    monkeypatch.setattr(
        cuda_backend, "FlashAttentionMetadataBuilder", FakeFlashAttentionBuilder
    )
    row = 2 * LAYOUT.head_size
    page_size = LAYOUT.page_bytes // LAYOUT.dtype.itemsize
    buffer = torch.zeros(NUM_BLOCKS * page_size, dtype=LAYOUT.dtype)
    kv_cache = buffer.as_strided(
        (NUM_BLOCKS, LAYOUT.num_kv_heads, 256, row), (page_size, 256 * row, row, 1)
    )
    settings = {"min_sparse_len": MIN_SPARSE_LEN}
    vllm_config = SimpleNamespace(
        additional_config={"clusterkv": settings},
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS),
        parallel_config=SimpleNamespace(rank=0, data_parallel_index=0),
        compilation_config=SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(kv_cache=kv_cache)}
        ),
    )
    spec = SimpleNamespace(
        num_kv_heads=LAYOUT.num_kv_heads,
        head_size=LAYOUT.head_size,
        dtype=LAYOUT.dtype,
    )
    return ClusterKVCUDAMetadataBuilder(
        spec, ["layer"], vllm_config, torch.device("cpu")
    )


class Tables:
    """vLLM's persistent tensors: rows of the batch get their blocks in each step."""

    def __init__(self):
        self.block_table = torch.zeros(MAX_REQS, MAX_BLOCKS, dtype=torch.int32)
        self.seq_lens = torch.zeros(MAX_REQS, dtype=torch.int32)

    def batch(self, computed, query_lens, prefilling, first_blocks, num_reqs=None):
        """A batch as Model Runner V2 makes it.

        Args:
            computed: Tokens before the step, of each real row.
            query_lens: Tokens of the step, of each real row.
            prefilling: Whether the row has prompt to compute.
            first_blocks: Block of the row's first page; the others follow it.
            num_reqs: Rows with padding, in a FULL graph.
        """
        num_real = len(computed)
        num_reqs = num_reqs or num_real
        lens = np.zeros(num_reqs, dtype=np.int32)
        lens[:num_real] = np.array(computed) + query_lens
        starts = np.zeros(num_reqs + 1, dtype=np.int32)
        starts[1 : num_real + 1] = np.cumsum(query_lens)
        starts[num_real + 1 :] = starts[num_real]
        self.block_table.zero_()
        for row, block in enumerate(first_blocks):
            self.block_table[row] = torch.arange(block, block + MAX_BLOCKS)
        self.seq_lens.zero_()
        self.seq_lens[:num_reqs] = torch.from_numpy(lens)
        num_tokens = max(int(starts[-1]), num_reqs)
        return CommonAttentionMetadata(
            query_start_loc=torch.from_numpy(starts.copy()),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=self.seq_lens[:num_reqs],
            seq_lens_cpu_upper_bound=torch.from_numpy(lens),
            num_reqs=num_reqs,
            num_actual_tokens=num_tokens,
            max_query_len=max(query_lens),
            max_seq_len=int(lens.max()),
            block_table_tensor=self.block_table[:num_reqs],
            slot_mapping=torch.arange(num_tokens),
            is_prefilling=torch.tensor(prefilling),
            positions=torch.arange(num_tokens),
            req_idx=np.arange(num_real),
        )


def min_sparse_lens(metadata):
    return metadata.decode.min_sparse_lens.tolist()


def test_pages_are_indexed_when_the_next_step_begins(builder, indexed):
    tables = Tables()
    builder.build(0, tables.batch([0, 200], [600, 56], [True, True], [10, 20]))
    assert indexed == []
    # The table has other rows now. The row that decodes fills its second page.
    builder.build(0, tables.batch([511], [1], [False], [30]))
    assert indexed == [([10, 11, 20], [16, 0, 16])]
    builder.build(0, tables.batch([600], [1], [False], [10]))
    assert indexed[1:] == [([31], [0])]
    builder.build(0, tables.batch([601], [1], [False], [10]))
    assert len(indexed) == 2


def test_dummy_batches_leave_pages_alone(builder, indexed):
    tables = Tables()
    builder.build(0, tables.batch([0], [256], [True], [10]))
    # Capture of a FULL graph, and the dummy step of a rank without requests.
    dummy = tables.batch([0] * 4, [1] * 4, [False] * 4, [0] * 4)
    builder.build_for_cudagraph_capture(dummy)
    assert indexed == []
    # Capture of a PIECEWISE graph: rows of several tokens that own no pages.
    builder.build(0, tables.batch([0] * 2, [512] * 2, [False] * 2, [0] * 2))
    assert indexed == [([10], [16])]
    builder.build(0, tables.batch([0], [1], [False], [0]))
    assert len(indexed) == 1


def test_mixed_batch(builder, indexed):
    # Rows of one token: two that decode, between them one that prefills.
    batch = Tables().batch(
        [700, 512, 40, 256, 0],
        [1, 1, 1, 100, 300],
        [False, True, False, True, True],
        [0, 10, 20, 5, 30],
    )
    metadata = builder.build(0, batch)
    assert (metadata.num_actual_tokens, metadata.num_decode_tokens) == (403, 3)
    assert min_sparse_lens(metadata) == [MIN_SPARSE_LEN, ALWAYS_DENSE, MIN_SPARSE_LEN]
    assert metadata.decode.seq_lens.tolist() == [701, 513, 41]
    assert metadata.decode.block_table[:, 0].tolist() == [0, 10, 20]
    prefill = metadata.prefill
    assert prefill.num_reqs == 2 and prefill.num_actual_tokens == 400
    assert prefill.query_start_loc.tolist() == [0, 100, 400]
    assert prefill.query_start_loc_cpu.tolist() == [0, 100, 400]
    assert prefill.seq_lens.tolist() == [356, 300]
    assert prefill.max_query_len == 300 and prefill.max_seq_len == 356
    assert prefill.block_table_tensor[:, 0].tolist() == [5, 30]
    assert prefill.slot_mapping.tolist() == list(range(3, 403))
    assert prefill.positions.tolist() == list(range(3, 403))
    assert prefill.is_prefilling.tolist() == [True, True]
    assert prefill.req_idx.tolist() == [3, 4]
    assert metadata.pages["layer"].kv_cache is builder._kv_cache


def test_caches_of_the_whole_batch_do_not_reach_prefill(builder):
    batch = Tables().batch([700, 256], [1, 100], [False, True], [0, 10])
    assert batch.compute_num_computed_tokens().tolist() == [700, 256]
    prefill = builder.build(0, batch).prefill
    assert prefill.compute_num_computed_tokens().tolist() == [256]


def test_prefill_only(builder):
    batch = Tables().batch([0, 256], [300, 100], [True, True], [0, 10])
    metadata = builder.build(0, batch)
    assert metadata.decode is None and metadata.num_decode_tokens == 0
    assert metadata.prefill is batch


def test_rows_that_prefill_in_a_full_graph_are_dense_for_that_step(builder):
    tables = Tables()
    # Four rows in a graph of six.
    captured = builder.build_for_cudagraph_capture(
        tables.batch([0] * 6, [1] * 6, [False] * 6, [0] * 6)
    )
    assert captured.prefill is None
    assert min_sparse_lens(captured) == [MIN_SPARSE_LEN] * 6

    args = ([700, 512, 300, 256], [1] * 4)
    builder.build(
        0, tables.batch(*args, [False, True, False, True], [0] * 4, num_reqs=6)
    )
    sparse, dense = MIN_SPARSE_LEN, ALWAYS_DENSE
    # What the graph reads, at the address that it was captured with.
    assert min_sparse_lens(captured) == [sparse, dense, sparse, dense, sparse, sparse]
    builder.build(0, tables.batch(*args, [False] * 4, [0] * 4, num_reqs=6))
    assert min_sparse_lens(captured) == [sparse] * 6


def test_larger_batches_select_from_shorter_contexts(builder):
    builder.config = replace(builder.config, min_sparse_len=None)
    tables = Tables()
    args = ([700], [1], [False], [0])
    alone = crossover_len(1, LAYOUT.num_kv_heads)
    assert min_sparse_lens(builder.build(0, tables.batch(*args))) == [alone]
    many = 32 // LAYOUT.num_kv_heads
    together = crossover_len(many, LAYOUT.num_kv_heads)
    assert together < alone and many <= MAX_REQS
    metadata = builder.build(0, tables.batch(*(arg * many for arg in args)))
    assert min_sparse_lens(metadata) == [together] * many
    assert min_sparse_lens(builder.build(0, tables.batch(*args))) == [alone]


@pytest.mark.parametrize(
    "num_reqs, expected", [(1, 8192), (3, 8192), (4, 4096), (31, 4096), (32, 2048)]
)
def test_crossover(num_reqs, expected):
    assert crossover_len(num_reqs, num_kv_heads=8) == expected


def test_a_budget_that_covers_most_of_a_row_is_not_worth_selecting(builder):
    builder.config = replace(builder.config, min_sparse_len=None, token_budget=8192)
    covered = builder.config.effective_min_sparse_len(0)
    batch = Tables().batch([700], [1], [False], [0])
    assert min_sparse_lens(builder.build(0, batch)) == [covered + covered // 2]


def test_new_kv_cache_is_bound(builder):
    tables = Tables()
    args = ([700], [1], [False], [0])
    first = builder.build(0, tables.batch(*args)).pages["layer"]
    layers = builder.vllm_config.compilation_config.static_forward_context
    layers["layer"].kv_cache = first.kv_cache[:]
    assert builder.build(0, tables.batch(*args)).pages["layer"] is not first


@pytest.mark.parametrize(
    "num_reqs, num_kv_heads, expected",
    [(1, 8, 32), (2, 8, 24), (1, 64, 6), (8, 8, 6), (12, 8, 4), (64, 8, 3)],
)
def test_num_splits(num_reqs, num_kv_heads, expected):
    assert num_splits(num_reqs, num_kv_heads, num_sms=132) == expected


@pytest.mark.parametrize(
    "num_reqs, num_kv_heads, max_pages, expected",
    [
        (1, 8, 128, 128),  # a page for each of 49 * 4 warps
        (1, 8, 512, 171),  # 3 for each of 196 would be more than 512
        (8, 8, 128, 22),  # 6 blocks: 6 pages for each of 24 warps
        (64, 8, 128, 4),  # one block, of 32 pages a warp
        (1000, 8, 130, 4),
        (1, 1, 1, 1),
        (1, 8, 4, 4),
    ],
)
def test_num_score_parts(num_reqs, num_kv_heads, max_pages, expected):
    found = num_score_parts(num_reqs, num_kv_heads, num_sms=132, max_pages=max_pages)
    assert found == expected
    # All but the last have equal shares.
    assert -(-max_pages // -(-max_pages // found)) == found
