# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The backend on vLLM's CUDA platform, for Model Runner V2.

A step's rows are ordered by vLLM: rows of one token first. Those go through
``decode``, the others, which all have prompt to compute, through FlashAttention over
the same pages. A row of one token may have prompt to compute too, the last of a chunk
or of a prefix hit: it attends densely (``min_sparse_lens``).

A batch of rows of one token runs as a FULL CUDA graph. What its kernels read has a
fixed address: the block table, lengths and KV cache are vLLM's, ``min_sparse_lens``
is the builder's, and the scratch is allocated with the first layer, so that vLLM's
memory profiling sees it. ``build`` runs before every step, also before a replay.

Pages are indexed when the next step begins (``docs/indexing.md``).
"""

from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakValueDictionary

import numpy as np
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_clusterkv import observe, requirements
from vllm_clusterkv.backend import (
    ClusterKVBackend,
    ClusterKVImpl,
    CompletedPages,
    DecodeMetadata,
    DecodeScratch,
    SemanticPages,
    decode,
    log_settings,
    logger,
)
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.indexing import (
    DeferredIndexing,
    LayerSpan,
    completed_pages,
    span_layers,
)
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout
from vllm_clusterkv.recall.worker import tier_of

MAX_SCRATCH_BYTES = 256 << 20
"""Scratch of a decode call. More rows than fit are processed in parts."""

LARGE_HEAD_BYTES = 134_144
"""Shared memory that ``index_pages`` takes at head size 256, 64 clusters a page."""

ALWAYS_DENSE = np.iinfo(np.int32).max
"""The ``min_sparse_len`` of a row that has prompt to compute."""

_MIN_SPLITS, _MAX_SPLITS = 3, 32

SCORE_BLOCKS_PER_SM = 3
"""Thread blocks of ``score_clusters`` that a multiprocessor gets."""

_SCORE_WARPS = 4  # of such a thread block


def crossover_len(num_reqs: int, num_kv_heads: int) -> int:
    """Tokens from which selecting pays.

    Scoring and selecting take some 10 us a layer however little they save, and they
    save in proportion to the batch. On an H100, Llama-3.1-8B's shapes, attention
    between a layer's other kernels, against FLASH_ATTN's (benchmarks/bench_ops.py):
    2,048 tokens at batch 1, 8 and 64 0.9x, 1.0x and 1.2x when sparse, 4,096 tokens
    1.1x, 1.6x and 2.0x. At batch 1, 4,096 tokens were slower than that in time per
    output token (0.94x, commit 6fb9bf3).

    Args:
        num_reqs: Decode rows.
        num_kv_heads: Of this rank.
    """
    num_pairs = num_reqs * num_kv_heads
    return 2048 if num_pairs >= 256 else 4096 if num_pairs >= 32 else 8192


def min_sparse_len(config: ClusterKVConfig, num_reqs: int, num_kv_heads: int) -> int:
    """Tokens from which a row is attended to sparsely; the fewer, the more rows."""
    crossover = crossover_len(num_reqs, num_kv_heads)
    # Measured with a budget of 1,024: larger ones leave less of such a row out.
    covered = config.effective_min_sparse_len(0)
    return config.effective_min_sparse_len(max(crossover, covered + covered // 2))


def num_splits(num_reqs: int, num_kv_heads: int, num_sms: int) -> int:
    """Parts into which ``sparse_decode`` splits a row.

    As many blocks as are resident at once, three a multiprocessor at head size 128
    (one wave: 36.1 us at 6 splits against 36.8 at 5 and 38.1 at 12; 32k tokens, batch
    8, Llama-3.1-8B's shapes, H100), but for the least and the most. At batch 64, three
    are 1 to 2% faster than two or four, sparse and dense.
    """
    wanted = 3 * num_sms // (num_reqs * num_kv_heads)
    return min(max(wanted, _MIN_SPLITS), _MAX_SPLITS)


def num_score_parts(
    num_reqs: int, num_kv_heads: int, num_sms: int, max_pages: int
) -> int:
    """Parts to which ``score_clusters`` deals a row's pages: a warp takes one.

    Args:
        num_reqs: Decode rows.
        num_kv_heads: Of this rank.
        num_sms: Multiprocessors.
        max_pages: Pages of a row, at most.
    """
    wanted = SCORE_BLOCKS_PER_SM * num_sms // (num_reqs * num_kv_heads)
    blocks = min(max(wanted, 1), max_pages)
    # Equal shares: a page more on some of the warps would cost as much as on all.
    pages_a_warp = -(-max_pages // (blocks * _SCORE_WARPS))
    return -(-max_pages // pages_a_warp)


class ClusterKVCUDABackend(ClusterKVBackend):
    """The backend as the CUDA platform selects it."""

    supported_dtypes = requirements.CUDA_DTYPES

    @staticmethod
    def get_impl_cls() -> type["ClusterKVCUDAImpl"]:
        return ClusterKVCUDAImpl

    @staticmethod
    def get_builder_cls() -> type["ClusterKVCUDAMetadataBuilder"]:
        return ClusterKVCUDAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return requirements.CUDA_HEAD_SIZES

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(*requirements.MIN_COMPUTE_CAPABILITY)

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability,
    ) -> str | None:
        if head_size == 256 and device_capability.major in (10, 11):
            return (
                "head_size 256 not supported on compute capability "
                f"{device_capability.as_version_str()}, where FlashAttention's pages "
                f"have 128 tokens and clusterkv's {BLOCK_SIZE}"
            )
        return None


@dataclass
class ClusterKVCUDAMetadata(AttentionMetadata):
    """A step's batch: rows of one token first, then prefill rows."""

    num_actual_tokens: int
    num_decode_tokens: int
    decode: DecodeMetadata | None
    prefill: FlashAttentionMetadata | None
    pages: dict[str, SemanticPages]  # by layer name


class ClusterKVCUDAMetadataBuilder(AttentionMetadataBuilder[ClusterKVCUDAMetadata]):
    """Splits the batch, and indexes the pages that the step before completed."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
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
        self.layout = PageLayout(
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            self.config.num_clusters,
            kv_cache_spec.dtype,
        )
        self.dense = FlashAttentionMetadataBuilder(
            kv_cache_spec, layer_names, vllm_config, device
        )
        # Prefill rows never run in a FULL graph, so their schedule needs no fixed
        # address and no bound on its splits.
        self.dense.use_full_cuda_graph = False

        self._min_sparse_len = self._min_sparse_len_of(1)  # in the tensor
        # [max_num_reqs] int32, read by CUDA graphs.
        self._min_sparse_lens = torch.full(
            (vllm_config.scheduler_config.max_num_seqs,),
            self._min_sparse_len,
            dtype=torch.int32,
            device=device,
        )
        self._has_dense_rows = False
        self._indexing = DeferredIndexing()
        # Of the KV cache that the layers had when they were made.
        self._kv_cache: torch.Tensor | None = None
        self._pages: dict[str, SemanticPages] = {}
        self._spans: list[LayerSpan] = []

        log_settings(self.config, self.layout)
        observe.set_stats_file(
            self.config.stats_path, layer_names, vllm_config.parallel_config
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ClusterKVCUDAMetadata:
        batch = common_attn_metadata
        self._bind_pages()
        # On the stream of the step's kernels, before all of them.
        self._indexing.run(self._spans, self.config)
        self._indexing.defer(self._gather_completed_pages(batch))
        metadata = self._split(batch)
        self._mark_dense_rows(batch, metadata.num_decode_tokens)
        return metadata

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> ClusterKVCUDAMetadata:
        """For the dummy batch of a FULL graph: leaves pages and lengths alone.

        The dummy batch of a PIECEWISE graph goes through ``build``, which it does no
        harm to: it fills no pages (``docs/indexing.md``).
        """
        self._bind_pages()
        return self._split(common_attn_metadata)

    def _bind_pages(self) -> None:
        """Makes the views of the layers' KV caches, when those are new.

        They belong to the builder, which vLLM drops together with the small KV cache
        of its memory profiling; kept by a layer they would keep that allocated.
        """
        layers = self.vllm_config.compilation_config.static_forward_context
        if layers[self.layer_names[0]].kv_cache is self._kv_cache:
            return
        caches = {name: layers[name].kv_cache for name in self.layer_names}
        self._kv_cache = caches[self.layer_names[0]]
        self._pages = {
            name: SemanticPages(cache, self.layout.index_view(cache))
            for name, cache in caches.items()
        }
        self._spans = span_layers(list(caches.values()), self.layout)

    def _gather_completed_pages(
        self, batch: CommonAttentionMetadata
    ) -> CompletedPages | None:
        assert batch.seq_lens_cpu_upper_bound is not None
        assert batch.is_prefilling is not None
        # Exact without speculative decoding.
        seq_lens = batch.seq_lens_cpu_upper_bound.numpy()
        query_lens = np.diff(batch.query_start_loc_cpu.numpy())
        rows, pages = completed_pages(seq_lens - query_lens, seq_lens)
        if len(rows):
            # A row of several tokens without prompt to compute is a dummy: it owns
            # no pages.
            is_real = (query_lens[rows] == 1) | batch.is_prefilling.numpy()[rows]
            rows, pages = rows[is_real], pages[is_real]
        if not len(rows):
            return None
        # The block ids are copied now: vLLM reuses the table for the next step.
        table = batch.block_table_tensor
        sinks = np.where(pages == 0, self.config.num_sink_tokens, 0)
        lists = async_tensor_h2d(
            np.stack([rows * table.stride(0) + pages, sinks]).astype(np.int32),
            device=self.device,
        )
        return CompletedPages(
            block_ids=table.view(-1).index_select(0, lists[0]),
            num_sink_tokens=lists[1],
        )

    def _mark_dense_rows(
        self, batch: CommonAttentionMetadata, num_decodes: int
    ) -> None:
        """Sets ``min_sparse_lens``: rows that have prompt to compute are dense."""
        assert batch.is_prefilling is not None
        # In a padded batch of a FULL graph, only of the real rows.
        is_dense = batch.is_prefilling.numpy()[:num_decodes]
        if not len(is_dense):
            return
        has_dense_rows = bool(is_dense.any())
        min_sparse_len = self._min_sparse_len_of(len(is_dense))
        is_new = min_sparse_len != self._min_sparse_len
        self._min_sparse_len = min_sparse_len
        if has_dense_rows or self._has_dense_rows or is_new:
            lens = np.full(
                len(self._min_sparse_lens), self._min_sparse_len, dtype=np.int32
            )
            lens[: len(is_dense)][is_dense] = ALWAYS_DENSE
            # From pinned memory of its own, which torch reuses after the copy.
            async_tensor_h2d(lens, out=self._min_sparse_lens)
        self._has_dense_rows = has_dense_rows

    def _min_sparse_len_of(self, num_decodes: int) -> int:
        return min_sparse_len(self.config, num_decodes, self.layout.num_kv_heads)

    def _split(self, batch: CommonAttentionMetadata) -> ClusterKVCUDAMetadata:
        # vLLM sorts rows by their tokens in the step alone, so rows of one token that
        # decode and that prefill are mixed: all of them count as decodes here.
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            batch
        )
        return ClusterKVCUDAMetadata(
            num_actual_tokens=batch.num_actual_tokens,
            num_decode_tokens=num_decode_tokens,
            decode=DecodeMetadata(
                batch.block_table_tensor[:num_decodes],
                batch.seq_lens[:num_decodes],
                self._min_sparse_lens[:num_decodes],
            )
            if num_decodes
            else None,
            prefill=self._build_prefill(batch, num_decodes, num_decode_tokens)
            if num_prefills
            else None,
            pages=self._pages,
        )

    def _build_prefill(
        self,
        batch: CommonAttentionMetadata,
        num_decodes: int,
        num_decode_tokens: int,
    ) -> FlashAttentionMetadata:
        if num_decodes == 0:
            return self.dense.build(0, batch)
        rows = slice(num_decodes, batch.num_reqs)
        assert batch.seq_lens_cpu_upper_bound is not None
        seq_lens_cpu = batch.seq_lens_cpu_upper_bound[rows]
        prefill_batch = replace(
            batch,
            query_start_loc=batch.query_start_loc[num_decodes:] - num_decode_tokens,
            query_start_loc_cpu=(
                batch.query_start_loc_cpu[num_decodes:] - num_decode_tokens
            ),
            seq_lens=batch.seq_lens[rows],
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            max_seq_len=int(seq_lens_cpu.max()),
            num_reqs=batch.num_reqs - num_decodes,
            num_actual_tokens=batch.num_actual_tokens - num_decode_tokens,
            block_table_tensor=batch.block_table_tensor[rows],
            slot_mapping=batch.slot_mapping[num_decode_tokens:],
            positions=(
                None if batch.positions is None else batch.positions[num_decode_tokens:]
            ),
            is_prefilling=(
                None if batch.is_prefilling is None else batch.is_prefilling[rows]
            ),
            req_idx=None if batch.req_idx is None else batch.req_idx[rows],
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return self.dense.build(0, prefill_batch)


class ClusterKVCUDAImpl(ClusterKVImpl):
    """Attention of one layer."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._check_shared_memory()
        self.dense = FlashAttentionImpl(*args, **kwargs)
        self.scratch = _get_scratch(
            get_current_vllm_config(),
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.config,
        )

    def _check_shared_memory(self) -> None:
        """Raises ValueError where ``index_pages`` has no room for its means."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        room: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        is_largest = self.head_size == 256 and self.config.tokens_per_cluster == 4
        if is_largest and room < LARGE_HEAD_BYTES:
            raise requirements.refusal(
                "clusterkv.tokens_per_cluster 4 at head size 256 needs "
                f"{LARGE_HEAD_BYTES} bytes of shared memory a thread block, "
                f"{properties.name} has {room}",
                "set clusterkv.tokens_per_cluster to 8",
            )

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes the step's K and V to their slots; a slot of -1 is padding."""
        self.dense.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def _attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ClusterKVCUDAMetadata,
        output: torch.Tensor,
    ) -> None:
        num_tokens = attn_metadata.num_actual_tokens
        num_decode_tokens = attn_metadata.num_decode_tokens
        if attn_metadata.prefill is not None:
            self.dense.forward(
                layer,  # type: ignore[arg-type]
                query[num_decode_tokens:num_tokens],
                key,
                value,
                kv_cache,
                attn_metadata.prefill,
                output[num_decode_tokens:num_tokens],
            )
        if attn_metadata.decode is not None:
            rows, host_pages = attn_metadata.decode, None
            layer_name = layer.layer_name  # type: ignore[attr-defined]
            host_tier = tier_of(layer_name)
            if host_tier is not None:
                rows = host_tier.resolve(layer_name, rows)
                host_pages = host_tier.host_pages(layer_name)
            decode(
                layer_name,
                query[:num_decode_tokens],
                attn_metadata.pages[layer_name],
                rows,
                self.scale,
                self.config,
                self.scratch,
                output[:num_decode_tokens],
                host_pages,
            )


# Layers run one after another, so those of one shape share their scratch. It lives as
# long as they do.
_scratches: WeakValueDictionary[tuple, DecodeScratch] = WeakValueDictionary()


def _get_scratch(
    vllm_config: VllmConfig,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    config: ClusterKVConfig,
) -> DecodeScratch:
    """The scratch of an engine's layers of one shape, on the current device.

    Raises:
        ValueError: ``stats_path`` is set, and a step's rows may not fit at once.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    shape = (num_heads, num_kv_heads, head_size)
    key = (vllm_config.instance_id, device, *shape)
    scratch = _scratches.get(key)
    if scratch is None:
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        max_blocks = -(-vllm_config.model_config.max_model_len // BLOCK_SIZE)
        scratch = DecodeScratch(
            max_num_seqs,
            *shape,
            max_blocks * config.num_clusters,
            partial(
                num_score_parts,
                num_kv_heads=num_kv_heads,
                num_sms=num_sms,
                max_pages=max_blocks,
            ),
            partial(num_splits, num_kv_heads=num_kv_heads, num_sms=num_sms),
            device,
            MAX_SCRATCH_BYTES,
        )
        if config.stats_path is not None and scratch.max_rows < max_num_seqs:
            raise requirements.refusal(
                f"clusterkv.stats_path takes at most {scratch.max_rows} requests a "
                f"step at this --max-model-len, got --max-num-seqs {max_num_seqs}",
                f"set --max-num-seqs {scratch.max_rows}",
            )
        logger.info_once(
            "CLUSTERKV attention: decode scratch of %d MiB.", scratch.num_bytes >> 20
        )
        _scratches[key] = scratch
    return scratch
