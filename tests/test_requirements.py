# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Start-up: what is refused, by a message that names the flag and the remedy.

Configurations are made as `vllm serve` makes them, from engine arguments and a
model's config.json; no weights are loaded.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.selector import AttentionSelectorConfig

import vllm_clusterkv
from vllm_clusterkv import ops, requirements

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
MISTRAL = LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 1024,
}
DEEPSEEK = LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 2,
}
BERT = LLAMA | {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "type_vocab_size": 2,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.fixture
def create_config(tmp_path):
    """Makes a VllmConfig as the server would."""

    def create(model=LLAMA, settings=None, backend="clusterkv", **engine_args):
        (tmp_path / "config.json").write_text(json.dumps(model))
        return EngineArgs(
            model=str(tmp_path),
            tokenizer=str(tmp_path),
            skip_tokenizer_init=True,
            load_format="dummy",
            attention_backend=backend,
            additional_config={"clusterkv": settings or {}},
            **engine_args,
        ).create_engine_config()

    return create


def test_page_size_is_set_without_a_flag(create_config):
    assert create_config().cache_config.block_size == 256
    assert create_config(block_size=256).cache_config.block_size == 256


def test_other_backends_are_left_alone(create_config):
    assert create_config(backend=None, block_size=32).cache_config.block_size == 32
    create_config(backend=None, settings={"no_such_setting": 1})


def test_views_for_submodels_are_left_alone(create_config):
    # As of an audio encoder, whose attention is not the backend's.
    config = create_config()
    tower = AutoConfig.for_model(**MISTRAL | {"architectures": None})
    config.model_config.hf_text_config = tower
    view = config.with_hf_config(tower)
    assert view.model_config.is_submodel_config
    assert view.cache_config.block_size == 256


@pytest.mark.parametrize(
    "engine_args, message",
    [
        ({"block_size": 128}, "--block-size must be 256, got 128; leave it out"),
        ({"prefix_match_unit": 32}, "--prefix-match-unit must be 256.*got 32"),
        ({"kv_cache_dtype": "fp8"}, "must be auto or the model's own.*got fp8"),
        ({"kv_cache_dtype": "float16"}, "own dtype, bfloat16, got float16"),
        ({"speculative_config": NGRAM}, "--speculative-config is not supported"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size must be 1, got 2"),
        (
            {"kv_offloading_size": 1.0},
            "--kv-offloading-size is not supported: .* clusterkv.host_memory_gib",
        ),
        ({"model": MISTRAL}, "window of 1024 tokens; pass --disable-sliding-window"),
        ({"model": DEEPSEEK}, "MLA models are not supported"),
        ({"model": BERT}, "must be a decoder.*got one of type encoder_only"),
        ({"settings": {"budget": 1}}, "no setting 'budget'; the settings are token_b"),
        (
            {"settings": {"token_budget": 0}},
            "clusterkv.token_budget must be an integer",
        ),
        ({"settings": {"tokens_per_cluster": 12}}, "must be 4, 8 or 16, got 12"),
        (
            {"settings": {"hot_cache_tokens": 1024}},
            "clusterkv.hot_cache_tokens is for clusterkv.host_memory_gib",
        ),
        (
            {"settings": {"host_memory_gib": 100_000}},
            "host_memory_gib needs 100000 GiB here, and the machine has .* lower it",
        ),
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="ClusterKVConnector", kv_role="kv_producer"
                )
            },
            "--kv-transfer-config is not supported",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_at_start_up(create_config, engine_args, message):
    with pytest.raises(ValueError, match=message):
        create_config(**engine_args)


def test_the_host_tier_is_a_connector_without_a_flag(create_config):
    config = create_config(settings={"host_memory_gib": 1})
    assert requirements.is_own_connector(config.kv_transfer_config)
    # As in the engine's process, which makes the configuration again.
    config.__post_init__()
    assert requirements.is_own_connector(config.kv_transfer_config)
    assert create_config().kv_transfer_config is None


@pytest.mark.parametrize(
    "engine_args, message",
    [
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="NixlConnector", kv_role="kv_both"
                )
            },
            "--kv-transfer-config is not supported with clusterkv.host_memory_gib",
        ),
        ({"scheduler_reserve_full_isl": False}, "--no-scheduler-reserve-full-isl is"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size is not supported"),
    ],
)
def test_refused_with_the_host_tier(create_config, engine_args, message):
    with pytest.raises(ValueError, match=message):
        create_config(settings={"host_memory_gib": 1}, **engine_args)


def test_another_connector_is_refused(create_config):
    with pytest.raises(ValueError, match="--kv-transfer-config is not supported: a KV"):
        create_config(
            kv_transfer_config=KVTransferConfig(
                kv_connector="NixlConnector", kv_role="kv_both"
            )
        )


def test_microbatching_is_refused(create_config):
    with pytest.raises(ValueError, match="--enable-dbo and --ubatch-size are not"):
        create_config(ubatch_size=2)


def test_decode_context_parallelism_is_refused(create_config):
    with pytest.raises(ValueError, match="--decode-context-parallel-size must be 1"):
        create_config(tensor_parallel_size=2, decode_context_parallel_size=2)


def test_sliding_window_disabled_by_flag_is_accepted(create_config):
    config = create_config(model=MISTRAL, disable_sliding_window=True)
    assert config.model_config.max_model_len == 1024


PLAIN_LAYER = AttentionSelectorConfig(
    head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=256
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"has_sliding_window": True}, "sliding-window attention"),
        ({"has_sink": True}, "attention sinks"),
        ({"use_mla": True}, "MLA"),
        ({"use_sparse": True}, "trained sparse attention"),
        ({"use_non_causal": True}, "non-causal attention"),
        ({"attn_type": "encoder_only"}, "decoder self-attention, got encoder_only"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "got fp8_e4m3; set --kv-cache-dtype bfloat16"),
        ({"head_size": 72}, "head_size must be one of .* got 72"),
        ({"use_batch_invariant": True}, "VLLM_BATCH_INVARIANT=1 .* unset it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_layer_is_refused(change, message):
    requirements.check_layer(PLAIN_LAYER)
    with pytest.raises(ValueError, match=f"clusterkv attention backend: .*{message}"):
        requirements.check_layer(PLAIN_LAYER._replace(**change))


@pytest.mark.parametrize(
    "is_cuda, found, expected",
    [(False, "0.34.1", "0.32"), (True, "0.32.0", "0.33"), (True, "0.34.1", "0.33")],
)
def test_unsupported_vllm_version_is_refused(monkeypatch, is_cuda, found, expected):
    monkeypatch.setattr(requirements.current_platform, "is_cpu", lambda: not is_cuda)
    monkeypatch.setattr(requirements.current_platform, "is_cuda", lambda: is_cuda)
    monkeypatch.setattr(requirements, "version", lambda name: found)
    message = f"at least {expected} and below 0.34 on .*, got {found}"
    with pytest.raises(ValueError, match=message):
        requirements._check_platform()


def test_another_platform_is_refused(create_config, monkeypatch):
    vllm_clusterkv.register()
    monkeypatch.setattr(requirements.current_platform, "is_cpu", lambda: False)
    with pytest.raises(ValueError, match="kernels for CPUs and NVIDIA GPUs"):
        create_config()


class CUDAConfig(SimpleNamespace):
    """What the checks for CUDA read of a ``VllmConfig``: a Llama, accepted."""

    def __init__(self, num_heads=32, stats_path=None, **changes):
        model = {"dtype": torch.bfloat16, "enforce_eager": False}
        model |= {name: changes.pop(name) for name in model if name in changes}
        super().__init__(
            **{
                "use_v2_model_runner": True,
                "parallel_config": None,
                "additional_config": {"clusterkv": {"stats_path": stats_path}},
                "model_config": SimpleNamespace(
                    get_num_attention_heads=lambda parallel_config: num_heads,
                    get_num_kv_heads=lambda parallel_config: 2,
                    **model,
                ),
                **changes,
            }
        )


@pytest.fixture
def cuda(monkeypatch):
    """A platform with a GPU, as far as the checks look."""
    platform = requirements.current_platform
    monkeypatch.setattr(ops, "HAS_CUDA_KERNELS", True)
    monkeypatch.setattr(
        platform, "get_device_capability", lambda: DeviceCapability(9, 0)
    )


def test_cuda_config_is_accepted(cuda):
    requirements._check_cuda(CUDAConfig())
    requirements._check_cuda(CUDAConfig(stats_path="stats", enforce_eager=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_v2_model_runner": False}, "Model Runner V2.*unset VLLM_USE_V2_MODEL"),
        ({"dtype": torch.float32}, "must be bfloat16 or float16 on a GPU, got float32"),
        ({"num_heads": 48}, "at most 16 query heads a KV head on a GPU, got 48 and 2"),
        ({"stats_path": "stats"}, "stats_path needs .* outside.*--enforce-eager"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_on_cuda(cuda, changes, message):
    with pytest.raises(ValueError, match=f"clusterkv attention backend: .*{message}"):
        requirements._check_cuda(CUDAConfig(**changes))


def test_old_gpu_is_refused(cuda, monkeypatch):
    monkeypatch.setattr(
        requirements.current_platform,
        "get_device_capability",
        lambda: DeviceCapability(7, 5),
    )
    with pytest.raises(ValueError, match="compute capability 8.0 or higher, got 7.5"):
        requirements._check_cuda(CUDAConfig())


def test_build_without_cuda_kernels_is_refused(cuda, monkeypatch):
    monkeypatch.setattr(ops, "HAS_CUDA_KERNELS", False)
    with pytest.raises(ValueError, match="without CUDA kernels; install it again"):
        requirements._check_cuda(CUDAConfig())


def test_streaming_input_needs_synchronous_scheduling():
    scheduler = SimpleNamespace(async_scheduling=False)
    config = SimpleNamespace(scheduler_config=scheduler)
    requirements.check_streaming_input(config)
    scheduler.async_scheduling = True
    with pytest.raises(ValueError, match="streaming input.*--no-async-scheduling"):
        requirements.check_streaming_input(config)
