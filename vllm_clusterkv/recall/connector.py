# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The KV connector by which the host tier is part of vLLM's steps.

Not for others' use of the connector interface: it moves pages of running requests, and
neither sends nor receives finished ones.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_clusterkv import requirements
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout
from vllm_clusterkv.recall import host_memory
from vllm_clusterkv.recall.books import RecallCounts
from vllm_clusterkv.recall.messages import Acknowledgement, Orders
from vllm_clusterkv.recall.metrics import RecallPromMetrics, RecallStats
from vllm_clusterkv.recall.scheduler import MIN_PAGES_FOR_INDEX_BLOCK, RecallScheduler
from vllm_clusterkv.recall.worker import HostTier, page_count, register_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.clusterkv")


class ClusterKVConnector(KVConnectorBase_V1, SupportsHMA):
    """Both roles; vLLM makes one object of each."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        """Sizes the tier.

        Raises:
            ValueError: ``host_memory_gib`` does not hold one request of
                ``--max-model-len``.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        config = ClusterKVConfig.from_additional_config(vllm_config.additional_config)
        (group,) = kv_cache_config.kv_cache_groups
        spec: Any = group.kv_cache_spec
        layout = PageLayout(
            spec.num_kv_heads, spec.head_size, config.num_clusters, spec.dtype
        )
        world_size = vllm_config.parallel_config.world_size
        num_layers = len(group.layer_names)
        num_host_pages = page_count(
            config.host_memory_gib / world_size, layout, num_layers
        )
        self._max_blocks = -(-vllm_config.model_config.max_model_len // BLOCK_SIZE)
        if num_host_pages < self._max_blocks:
            page_gib = world_size * num_layers * layout.kv_bytes / 2**30
            least = math.ceil(self._max_blocks * page_gib * 1e3) / 1e3
            raise requirements.refusal(
                "clusterkv.host_memory_gib must hold a request of --max-model-len, "
                f"{self._max_blocks} pages, which takes {least:g} GiB, "
                f"got {config.host_memory_gib}",
                "raise it, or lower --max-model-len",
            )
        self._layout = layout
        self._num_host_pages = num_host_pages
        min_spillable_len = _min_spillable_len(config, layout.num_kv_heads)
        moves = vllm_config.model_config.max_model_len >= min_spillable_len
        num_hot_blocks = _num_hot_blocks(
            config, self._max_blocks, kv_cache_config.num_blocks
        )
        if not moves:
            num_hot_blocks = 0
        # Tables are of all slots: no more than the host pool has use for.
        num_pages_a_slot = MIN_PAGES_FOR_INDEX_BLOCK + num_hot_blocks
        self._max_slots = min(
            vllm_config.scheduler_config.max_num_seqs,
            max(num_host_pages // num_pages_a_slot, 1),
        )
        self._poison_released = config.poison_released
        self._num_hot_blocks = num_hot_blocks
        self._tier: HostTier | None = None
        self._layer_names: list[str] = []
        self._scheduler: RecallScheduler | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = RecallScheduler(
                num_host_pages,
                self._max_slots,
                layout.entries_per_block,
                BLOCK_SIZE,
                world_size,
                min_spillable_len,
                config.host_watermark,
                num_hot_blocks=num_hot_blocks,
            )
            self._reported: RecallCounts | None = None
            if not moves:
                logger.warning(
                    "CLUSTERKV host tier: no page will move. Only requests of %d tokens"
                    " and more lose pages (clusterkv.min_sparse_len, or what other "
                    "settings make of null), and --max-model-len is %d.",
                    min_spillable_len,
                    vllm_config.model_config.max_model_len,
                )
            logger.info(
                "CLUSTERKV host tier: %d pages, %d tokens, in %.3g GiB of CPU memory; "
                "hot cache of %d tokens a request.",
                num_host_pages,
                num_host_pages * BLOCK_SIZE,
                config.host_memory_gib,
                num_hot_blocks * BLOCK_SIZE,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        return False

    # Scheduler.

    @property
    def _decisions(self) -> RecallScheduler:
        assert self._scheduler is not None, "not the scheduler's connector"
        return self._scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        self._decisions.bind(kv_cache_manager)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        self._decisions.note_waiting(request, num_computed_tokens)
        return 0, False

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        self._decisions.note_allocated(request)

    def build_connector_meta(
        self, scheduler_output: "SchedulerOutput"
    ) -> KVConnectorMetadata:
        # Before the forward: this step's decode reads the tables.
        scheduler_output.has_sync_kv_loads = True
        return self._decisions.plan(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        acknowledgement = connector_output.kv_connector_worker_meta
        if acknowledgement is not None:
            assert isinstance(acknowledgement, Acknowledgement)
            self._decisions.books.acknowledge(acknowledgement.completed)

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._decisions.forget(request)
        return False, None

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._decisions.forget(request)
        return False, None

    def has_pending_block_frees(self) -> bool:
        return self._decisions.books.num_pending_frees > 0

    def has_pending_push_work(self) -> bool:
        return self._decisions.books.num_pending > 0

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._scheduler is None:
            taken = self._tier.take_counts() if self._tier is not None else None
            return None if taken is None else RecallStats(data=taken)
        counts = self._scheduler.books.counts()
        # While it is in use, vLLM's log line has it each time.
        if counts == self._reported and not counts.num_slots:
            return None
        stats = RecallStats.between(self._reported, counts)
        self._reported = counts
        return stats

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return RecallStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> KVConnectorPromMetrics:
        return RecallPromMetrics(*args, **kwargs)

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        pool_bytes = self._num_host_pages * len(kv_caches) * self._layout.kv_bytes
        # The other workers of this machine take as much, perhaps after this check.
        num_workers = self._vllm_config.parallel_config.local_world_size
        host_memory.check(pool_bytes * num_workers)
        self._tier = HostTier(
            self._layout,
            kv_caches,
            self._num_host_pages,
            self._max_slots,
            self._max_blocks,
            self._num_hot_blocks,
            self._poison_released,
        )
        self._layer_names = list(kv_caches)
        register_layers(self._layer_names, self._tier)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders) and self._tier is not None
        self._tier.apply(orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        assert self._tier is not None
        completed = self._tier.take_completed()
        return Acknowledgement(dict.fromkeys(completed, 1)) if completed else None

    def shutdown(self) -> None:
        register_layers(self._layer_names, None)
        if self._tier is not None:
            self._tier.close()
        self._tier = None


def _num_hot_blocks(config: ClusterKVConfig, max_blocks: int, num_blocks: int) -> int:
    """Blocks that hold what a request has recalled.

    Args:
        config: Settings.
        max_blocks: Pages of the longest request.
        num_blocks: Of the KV cache.

    Raises:
        ValueError: ``hot_cache_tokens`` is more than a request's pages make up for, or
            more than a quarter of the KV cache.
    """
    if config.hot_cache_tokens is None:
        return min(config.wanted_hot_blocks, max_blocks // 4, num_blocks // 16)
    num_hot_blocks = config.wanted_hot_blocks
    # Neither the first page leaves nor the last.
    most = max(min(max_blocks - 2 - MIN_PAGES_FOR_INDEX_BLOCK, num_blocks // 4), 0)
    if num_hot_blocks > most:
        raise requirements.refusal(
            f"clusterkv.hot_cache_tokens must be at most {most * BLOCK_SIZE} with this "
            f"--max-model-len and {num_blocks} blocks of KV cache, "
            f"got {config.hot_cache_tokens}",
            "lower it, or leave it out",
        )
    return num_hot_blocks


def _min_spillable_len(config: ClusterKVConfig, num_kv_heads: int) -> int:
    """Tokens from which a row is sparse whatever the batch."""
    # Imported here, since one of them is of another platform.
    if current_platform.is_cuda():
        from vllm_clusterkv.cuda_backend import min_sparse_len

        return min_sparse_len(config, 1, num_kv_heads)
    from vllm_clusterkv.cpu_backend import CROSSOVER_LEN

    return config.effective_min_sparse_len(CROSSOVER_LEN)
