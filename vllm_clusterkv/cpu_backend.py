# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The backend on vLLM's CPU platform.

Prefill is dense, by vLLM's own CPU kernels. They want K transposed and packed in a
layout of their own, so the pages of prefilling rows are copied into a scratch cache
in that layout first: linear work beside the quadratic attention, and the pages
themselves keep the one layout that sorting and selection need.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionLayer,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_clusterkv import observe
from vllm_clusterkv.backend import (
    ClusterKVBackend,
    ClusterKVImpl,
    CompletedPages,
    DecodeMetadata,
    DecodeScratch,
    SemanticPages,
    decode,
    index_completed_pages,
    log_settings,
)
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout
from vllm_clusterkv.recall.worker import tier_of

CROSSOVER_LEN = 2048
"""Tokens from which selecting is faster than attending to everything, on a CPU.

At budget 1024 the two tie at 2,176 tokens for SmolLM2-135M's shapes and at 1,664 for
Llama-3.1-8B's (2 threads of an AMD EPYC, bf16): ``bench_decode_cpu.py --no-vllm
--batch-sizes 1 --context-lens 1792 2304 2816``, whose rows are 128 tokens shorter.
"""

NUM_SCORE_PARTS = 16
"""Parts that ``score_clusters`` deals a row's pages to: as many threads may score one
row and KV head, and ``select_clusters`` merges them by one vector's work. A constant,
as ``NUM_SPLITS``."""

NUM_SPLITS = 8
"""Parts of a row's pages that ``sparse_decode`` attends to separately. A constant,
so that a row's result does not depend on its batch."""


class ClusterKVCPUBackend(ClusterKVBackend):
    """The backend as the CPU platform selects it."""

    @staticmethod
    def get_impl_cls() -> type["ClusterKVCPUImpl"]:
        return ClusterKVCPUImpl

    @staticmethod
    def get_builder_cls() -> type["ClusterKVCPUMetadataBuilder"]:
        return ClusterKVCPUMetadataBuilder


@dataclass
class PrefillMetadata:
    """The rows of a step that still have prompt to compute.

    The scratch cache holds each page of these rows once, however many rows share
    it, and of each page only the tokens written so far; the rest is zero.
    """

    attention: CPUAttentionMetadata  # over scratch pages
    scratch: torch.Tensor  # [num_pages, num_kv_heads, BLOCK_SIZE, 2 * head_size]
    blocks: torch.Tensor  # [num_context_tokens] int64, page of each token to copy
    rows: torch.Tensor  # [num_context_tokens] int64, its row in the page
    slots: torch.Tensor  # [num_context_tokens] int64, its slot in the scratch cache


@dataclass
class ClusterKVCPUMetadata:
    """A step's batch: decode rows first, then prefill rows."""

    num_actual_tokens: int
    num_decode_tokens: int
    decode: DecodeMetadata | None
    prefill: PrefillMetadata | None
    completed: CompletedPages | None


class ClusterKVCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits the batch and finds the pages that the step completes."""

    reorder_batch_threshold = 1  # decode rows first

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = ClusterKVConfig.from_additional_config(
            vllm_config.additional_config
        )
        self.min_sparse_len = self.config.effective_min_sparse_len(CROSSOVER_LEN)
        self.layout = PageLayout(
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            self.config.num_clusters,
            kv_cache_spec.dtype,
        )
        log_settings(self.config, self.layout)
        observe.set_stats_file(
            self.config.stats_path, layer_names, vllm_config.parallel_config
        )

    def build(  # type: ignore[override]
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ClusterKVCPUMetadata:
        batch = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            batch, treat_short_extends_as_decodes=False
        )
        decode_metadata = None
        if num_decodes:
            seq_lens = batch.seq_lens[:num_decodes]
            max_blocks = -(-int(seq_lens.max()) // BLOCK_SIZE)
            decode_metadata = DecodeMetadata(
                batch.block_table_tensor[:num_decodes, : max(max_blocks, 1)],
                seq_lens,
                torch.full_like(seq_lens, self.min_sparse_len),
            )
        return ClusterKVCPUMetadata(
            num_actual_tokens=batch.num_actual_tokens,
            num_decode_tokens=num_decode_tokens,
            decode=decode_metadata,
            prefill=self._build_prefill(batch, num_decodes, num_decode_tokens)
            if num_prefills
            else None,
            completed=self._find_completed_pages(batch),
        )

    def _build_prefill(
        self,
        batch: CommonAttentionMetadata,
        num_decodes: int,
        num_decode_tokens: int,
    ) -> PrefillMetadata:
        seq_lens = batch.seq_lens[num_decodes : batch.num_reqs]
        block_table = batch.block_table_tensor[num_decodes : batch.num_reqs].numpy()
        lens = seq_lens.numpy()
        num_pages = -(-lens // BLOCK_SIZE)

        # Every (row, page) pair, then each block once with the tokens it holds. A
        # block that rows share is complete, so any of its pairs tells.
        req = np.repeat(np.arange(len(lens)), num_pages)
        page = np.concatenate([np.arange(n) for n in num_pages])
        filled = np.minimum(lens[req] - page * BLOCK_SIZE, BLOCK_SIZE)
        blocks, first, scratch_ids = np.unique(
            block_table[req, page], return_index=True, return_inverse=True
        )
        scratch_table = np.zeros((len(lens), int(num_pages.max())), dtype=np.int32)
        scratch_table[req, page] = scratch_ids
        token_page = np.repeat(np.arange(len(blocks)), filled[first])
        token_row = np.concatenate([np.arange(n) for n in filled[first]])

        prefill_batch = replace(
            batch,
            query_start_loc=batch.query_start_loc[num_decodes:] - num_decode_tokens,
            query_start_loc_cpu=(
                batch.query_start_loc_cpu[num_decodes:] - num_decode_tokens
            ),
            seq_lens=seq_lens,
            num_reqs=len(lens),
            num_actual_tokens=batch.num_actual_tokens - num_decode_tokens,
            block_table_tensor=torch.from_numpy(scratch_table),
            slot_mapping=batch.slot_mapping[num_decode_tokens:],
        )
        return PrefillMetadata(
            attention=super().build(0, prefill_batch),
            scratch=torch.zeros(
                (len(blocks), self.num_kv_heads, BLOCK_SIZE, 2 * self.head_dim),
                dtype=self.layout.dtype,
            ),
            blocks=torch.from_numpy(blocks[token_page].astype(np.int64)),
            rows=torch.from_numpy(token_row),
            slots=torch.from_numpy(token_page * BLOCK_SIZE + token_row),
        )

    def _find_completed_pages(
        self, batch: CommonAttentionMetadata
    ) -> CompletedPages | None:
        seq_lens = batch.seq_lens[: batch.num_reqs].numpy()
        query_start_loc = batch.query_start_loc_cpu[: batch.num_reqs + 1].numpy()
        computed = seq_lens - np.diff(query_start_loc)
        first, end = computed // BLOCK_SIZE, seq_lens // BLOCK_SIZE
        if not (end > first).any():
            return None
        req = np.repeat(np.arange(len(seq_lens)), np.maximum(end - first, 0))
        page = np.concatenate(list(map(np.arange, first, end)))
        sinks = np.where(page == 0, self.config.num_sink_tokens, 0)
        return CompletedPages(
            block_ids=batch.block_table_tensor[torch.from_numpy(req), page],
            num_sink_tokens=torch.from_numpy(sinks.astype(np.int32)),
        )


class ClusterKVCPUImpl(ClusterKVImpl):
    """Attention of one layer."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.dense = CPUAttentionBackendImpl(*args, **kwargs)
        self._pages: SemanticPages | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes the step's K and V to their slots; a slot of -1 is padding."""
        num_tokens = len(slot_mapping)
        rows = torch.cat([key[:num_tokens], value[:num_tokens]], dim=-1)
        if len(slot_mapping) and int(slot_mapping.min()) < 0:
            kept = slot_mapping >= 0
            rows, slot_mapping = rows[kept], slot_mapping[kept]
        kv_cache[slot_mapping // BLOCK_SIZE, :, slot_mapping % BLOCK_SIZE] = rows

    def _attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ClusterKVCPUMetadata,
        output: torch.Tensor,
    ) -> None:
        num_tokens = attn_metadata.num_actual_tokens
        num_decode_tokens = attn_metadata.num_decode_tokens
        pages = self._semantic_pages(kv_cache)
        if attn_metadata.prefill is not None:
            self._prefill(
                layer,
                query[num_decode_tokens:num_tokens],
                kv_cache,
                attn_metadata.prefill,
                output[num_decode_tokens:num_tokens],
            )
        if attn_metadata.completed is not None:
            index_completed_pages(pages, attn_metadata.completed, self.config)
        if attn_metadata.decode is not None:
            rows, host_pages = attn_metadata.decode, None
            name = layer.layer_name  # type: ignore[attr-defined]
            host_tier = tier_of(name)
            if host_tier is not None:
                rows = host_tier.resolve(name, rows)
                host_pages = host_tier.host_pages(name)
            decode(
                name,
                query[:num_decode_tokens],
                pages,
                rows,
                self.scale,
                self.config,
                self._new_scratch(rows.block_table),
                output[:num_decode_tokens],
                host_pages,
            )

    def _prefill(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: PrefillMetadata,
        output: torch.Tensor,
    ) -> None:
        # [num_context_tokens, num_kv_heads, 2 * head_size]
        context = kv_cache[metadata.blocks, :, metadata.rows]
        key, value = context.split(self.head_size, dim=-1)
        self.dense.do_kv_cache_update(
            layer,  # type: ignore[arg-type]
            key,
            value,
            metadata.scratch,
            metadata.slots,
        )
        self.dense.forward(
            layer, query, key, value, metadata.scratch, metadata.attention, output
        )

    def _new_scratch(self, block_table: torch.Tensor) -> DecodeScratch:
        num_decodes, max_blocks = block_table.shape
        return DecodeScratch(
            num_decodes,
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            max_blocks * self.config.num_clusters,
            lambda num_rows: NUM_SCORE_PARTS,
            lambda num_rows: NUM_SPLITS,
            block_table.device,
        )

    def _semantic_pages(self, kv_cache: torch.Tensor) -> SemanticPages:
        if self._pages is None or self._pages.kv_cache is not kv_cache:
            layout = PageLayout(
                self.num_kv_heads,
                self.head_size,
                self.config.num_clusters,
                kv_cache.dtype,
            )
            self._pages = SemanticPages(kv_cache, layout.index_view(kv_cache))
        return self._pages
