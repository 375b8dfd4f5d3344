# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Dense decode attention of others, on the same rows and pages."""

import importlib.util
from collections.abc import Callable
from typing import Protocol

import torch
from gpu_layers import Layers

from vllm_clusterkv.page_layout import BLOCK_SIZE

# AttentionConfig.flash_attn_max_num_splits_for_cuda_graph, vLLM's default.
FLASH_ATTN_MAX_NUM_SPLITS = 32


class Unavailable(Exception):
    """Why a baseline cannot run here."""


class Baseline(Protocol):
    """Dense attention of a batch of decode rows."""

    output: torch.Tensor  # [batch_size, num_heads, head_size], of the last call

    def __call__(self, layer_idx: int) -> None: ...


class FlashAttention:
    """FLASH_ATTN of vLLM, as it decodes in a FULL CUDA graph.

    That is ``FlashAttentionImpl.forward`` and its metadata builder: K and V as views of
    the pool; the scheduler metadata from the batch's longest row, made once a step, so
    not timed; ``max_seqlen_k`` the model's longest, as when the graph was captured.
    """

    def __init__(self, layers: Layers):
        try:
            from vllm.v1.attention.backends import fa_utils
            from vllm.vllm_flash_attn import flash_attn_varlen_func
        except ImportError as error:
            raise Unavailable(f"vLLM's FlashAttention: {error}") from error
        self.flash_attn_varlen_func = flash_attn_varlen_func
        fa_version = fa_utils.get_flash_attn_version()
        if fa_version is None:
            raise Unavailable("vLLM finds no FlashAttention for this device")
        self.fa_version = fa_version
        case, query = layers.case, layers.query
        batch_size, num_heads, head_size = query.shape
        self.layers = layers
        self.caches = [
            pages.kv_cache.transpose(1, 2).split(head_size, dim=-1)
            for pages in layers.pages
        ]  # (K, V) of each layer: [num_blocks, BLOCK_SIZE, num_kv_heads, head_size]
        self.output = torch.empty_like(query)
        self.query_start_loc = torch.arange(
            batch_size + 1, dtype=torch.int32, device=query.device
        )
        self.descale = torch.ones((), device=query.device).expand(
            batch_size, case.shape.num_kv_heads
        )
        self.max_model_len = max(case.max_model_len, case.context_len)
        self.scheduler_metadata = None
        self.num_splits = 0
        if self.fa_version == 3:
            self.num_splits = FLASH_ATTN_MAX_NUM_SPLITS
            self.scheduler_metadata = fa_utils.get_scheduler_metadata(
                batch_size=batch_size,
                max_seqlen_q=1,
                max_seqlen_k=int(layers.seq_lens.max()),
                num_heads_q=num_heads,
                num_heads_kv=case.shape.num_kv_heads,
                headdim=head_size,
                cache_seqlens=layers.seq_lens,
                qkv_dtype=case.shape.dtype,
                cu_seqlens_q=self.query_start_loc,
                page_size=BLOCK_SIZE,
                causal=True,
                window_size=(-1, -1),
                num_splits=self.num_splits,
            )

    def __call__(self, layer_idx: int) -> None:
        key_cache, value_cache = self.caches[layer_idx]
        self.flash_attn_varlen_func(
            q=self.layers.query,
            k=key_cache,
            v=value_cache,
            out=self.output,
            cu_seqlens_q=self.query_start_loc,
            max_seqlen_q=1,
            seqused_k=self.layers.seq_lens,
            max_seqlen_k=self.max_model_len,
            softmax_scale=self.layers.case.scale,
            causal=True,
            window_size=[-1, -1],
            block_table=self.layers.block_table,
            softcap=0,
            scheduler_metadata=self.scheduler_metadata,
            fa_version=self.fa_version,
            q_descale=self.descale,
            k_descale=self.descale,
            v_descale=self.descale,
            num_splits=self.num_splits,
        )


class FlashInfer:
    """FlashInfer's paged decode with tensor cores, planned once, as vLLM uses it."""

    def __init__(self, layers: Layers):
        _require("flashinfer")
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        case, query = layers.case, layers.query
        head_size, device = case.shape.head_size, query.device
        self.layers = layers
        self.caches = [
            tuple(pages.kv_cache.split(head_size, dim=-1)) for pages in layers.pages
        ]  # (K, V) of each layer: [num_blocks, num_kv_heads, BLOCK_SIZE, head_size]
        self.output = torch.empty_like(query)
        blocks = layers.block_table[:, : case.num_pages].flatten().contiguous()
        starts = torch.arange(case.batch_size + 1, dtype=torch.int32) * case.num_pages
        used = (case.context_len - 1) % BLOCK_SIZE + 1  # rows of the last page
        last_page_lens = torch.full((case.batch_size,), used, dtype=torch.int32)
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(512 * 2**20, dtype=torch.uint8, device=device),
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=starts.to(device),
            paged_kv_indices_buffer=blocks.clone(),
            paged_kv_last_page_len_buffer=last_page_lens.to(device),
        )
        self.wrapper.plan(
            starts,
            blocks,
            last_page_lens,
            case.shape.num_heads,
            case.shape.num_kv_heads,
            head_size,
            BLOCK_SIZE,
            q_data_type=case.shape.dtype,
            kv_data_type=case.shape.dtype,
            sm_scale=case.scale,
        )

    def __call__(self, layer_idx: int) -> None:
        self.wrapper.run(self.layers.query, self.caches[layer_idx], out=self.output)


class Xformers:
    """xformers' Triton split-K kernel on paged keys.

    It wants K and V in pools of their own without padding, so it gets copies.
    """

    def __init__(self, layers: Layers):
        _require("xformers")
        from xformers.ops import fmha
        from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask

        case, query = layers.case, layers.query
        kv_heads, size = case.shape.num_kv_heads, case.shape.head_size
        self.fmha = fmha
        self.scale = case.scale
        if query.is_cuda:
            torch.cuda.empty_cache()
            free_bytes, _ = torch.cuda.mem_get_info()
            if free_bytes < 1.1 * len(layers) * case.layer_bytes + 2**31:
                raise Unavailable("too little memory for a copy of the pages")
        self.query = query.view(1, case.batch_size, kv_heads, -1, size)
        group = self.query.shape[3]
        self.caches = []
        for pages in layers.pages:
            rows = pages.kv_cache.transpose(1, 2).split(size, dim=-1)
            key, value = (half.reshape(1, -1, kv_heads, 1, size) for half in rows)
            self.caches.append(
                (key.expand(-1, -1, -1, group, -1), value.expand(-1, -1, -1, group, -1))
            )  # [1, num_blocks * BLOCK_SIZE, num_kv_heads, group, head_size]
        self.mask = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen=[1] * case.batch_size,
            kv_seqlen=[case.context_len] * case.batch_size,
            block_tables=layers.block_table[:, : case.num_pages].contiguous(),
            page_size=BLOCK_SIZE,
            device=query.device,
        )
        self.output = torch.empty_like(query)

    def __call__(self, layer_idx: int) -> None:
        key, value = self.caches[layer_idx]
        output = self.fmha.memory_efficient_attention_forward(
            self.query,
            key,
            value,
            attn_bias=self.mask,
            scale=self.scale,
            op=self.fmha.triton_splitk.FwOp,
        )
        # Not copied: the kernel has no output argument, and a copy would cost time.
        self.output = output.view_as(self.output)


BASELINES: dict[str, Callable[[Layers], Baseline]] = {
    "flash_attn": FlashAttention,
    "flashinfer": FlashInfer,
    "xformers": Xformers,
}


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
