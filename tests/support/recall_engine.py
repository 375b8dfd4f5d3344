# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""vLLM's real scheduler with the host tier, and a model of the workers' memory.

No model runs. A row of K and V is stood in for by a number that depends on the tokens
up to it, and the next token by one that depends on that. So what every page of every
request must hold is known, whoever computed it, and the workers here, which act on
``Orders`` as real ones do, find out whether the tables lead to it.
"""

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.recall_books import check_books
from vllm_clusterkv.recall.messages import (
    Acknowledgement,
    ClearSlot,
    Orders,
    Release,
    SetTail,
    StartSlot,
    Transfer,
)
from vllm_clusterkv.recall.scheduler import RecallScheduler

BLOCK = 4
"""Tokens a page."""

VOCAB = 500
POISON = -1

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCAB + 1,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


class RecallConnector(KVConnectorBase_V1, SupportsHMA):
    """As little of a connector as the scheduler's half needs."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        assert role == KVConnectorRole.SCHEDULER
        settings = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.recall = RecallScheduler(block_size=BLOCK, **settings)

    @property
    def requires_kv_delivery(self):
        return False

    def bind_kv_cache_manager(self, kv_cache_manager):
        self.recall.bind(kv_cache_manager)

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        self.recall.note_waiting(request, num_computed_tokens)
        return 0, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        self.recall.note_allocated(request)

    def build_connector_meta(self, scheduler_output):
        return self.recall.plan(scheduler_output)

    def update_connector_output(self, connector_output):
        if connector_output.kv_connector_worker_meta is not None:
            self.recall.books.acknowledge(
                connector_output.kv_connector_worker_meta.completed
            )

    def request_finished_all_groups(self, request, block_ids):
        self.recall.forget(request)
        return False, None

    def has_pending_block_frees(self):
        return self.recall.books.num_pending_frees > 0

    def has_pending_push_work(self):
        return self.recall.books.num_pending > 0

    def start_load_kv(self, forward_context, **kwargs):
        raise NotImplementedError

    def wait_for_layer_load(self, layer_name):
        raise NotImplementedError

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        raise NotImplementedError

    def wait_for_save(self):
        raise NotImplementedError


class Truth:
    """What the rows of each request must hold, and its tokens."""

    def __init__(self) -> None:
        self._tokens: dict[str, list[int]] = {}
        self._rows: dict[str, list[int]] = {}

    def add(self, request_id: str, prompt: list[int]) -> None:
        self._tokens[request_id], self._rows[request_id] = list(prompt), []

    def rows(self, request_id: str, end: int) -> list[int]:
        """At least the first ``end`` rows."""
        tokens, rows = self._tokens[request_id], self._rows[request_id]
        while len(rows) < end:
            if len(rows) == len(tokens):
                tokens.append(rows[-1] % VOCAB + 1)
            before = rows[-1] if rows else 0
            rows.append((before * 1_000_003 + tokens[len(rows)] + 7) % (2**61 - 1))
        return rows

    def token(self, request_id: str, position: int) -> int:
        self.rows(request_id, position + 1)
        return self._tokens[request_id][position]


@dataclass
class Row:
    """A request in a step, as the model runner sees it."""

    request_id: str
    num_computed: int
    num_new: int
    decodes: bool


@dataclass
class Pending:
    transfer: Transfer
    steps_left: int


@dataclass
class Worker:
    """One rank: its GPU and host memory, its tables.

    Attributes:
        truth: Of all requests.
        delay: Gives the steps that the next copy takes.
        min_spillable_len: Rows with fewer tokens are dense.
        copies_early: Whether a copy is made when it is ordered, or when it completes.
            Both, and all in between, may happen.
        num_recalled: Pages found on the host by decoding rows, so far.
    """

    truth: Truth
    delay: Callable[[], int]
    min_spillable_len: int
    copies_early: bool
    rows: dict[int, list[int]] = field(default_factory=dict)
    index: dict[int, int] = field(default_factory=dict)
    entries: dict[int, dict[int, int]] = field(default_factory=dict)
    host: dict[int, list[int]] = field(default_factory=dict)
    block_tables: dict[str, list[int]] = field(default_factory=dict)
    tails: dict[int, int] = field(default_factory=dict)
    released: dict[int, dict[int, Release]] = field(default_factory=dict)
    filled: list[int] = field(default_factory=list)
    pending: deque[Pending] = field(default_factory=deque)
    num_recalled: int = 0

    def execute(
        self, output: SchedulerOutput, orders: Orders, rows: list[Row]
    ) -> dict[int, int]:
        """A step: as ``docs/recall.md`` orders it. Returns the copies completed."""
        if rows:
            # The metadata builder indexes what the last step filled.
            for block in self.filled:
                self.index[block] = self.rows[block][-1]
            self.filled = []
        for command in orders.commands:
            self._apply(command)
        for block in orders.reused_blocks:
            self.rows[block] = [POISON] * BLOCK
            self.index[block] = POISON
            self.entries.pop(block, None)
        for transfer in orders.transfers:
            self._start(transfer)
        self._update_block_tables(output)
        for row in rows:
            self._write(row)
        for row in rows:
            self._read(row)
        return self._complete()

    def _apply(self, command) -> None:
        match command:
            case StartSlot(slot):
                assert slot not in self.released, "a slot begins before it ended"
                self.released[slot] = {}
            case ClearSlot(slot):
                del self.released[slot]
                self.tails.pop(slot, None)
            case SetTail(slot, block):
                assert slot in self.released
                self.tails[slot] = block
            case Release(slot, page):
                assert page not in self.released[slot], "released twice"
                self.released[slot][page] = command

    def _start(self, transfer: Transfer) -> None:
        entry = transfer.entry
        self.entries.setdefault(entry.block, {})[entry.number] = self.index[
            transfer.block
        ]
        self.rows[entry.block] = [POISON] * BLOCK
        if self.copies_early:
            self._copy(transfer)
        self.pending.append(Pending(transfer, self.delay()))

    def _copy(self, transfer: Transfer) -> None:
        self.host[transfer.host_page] = list(self.rows[transfer.block])

    def _complete(self) -> dict[int, int]:
        """Ends copies, in the order in which they were begun."""
        completed = {}
        for copy in self.pending:
            copy.steps_left -= 1
        while self.pending and self.pending[0].steps_left <= 0:
            copy = self.pending.popleft()
            if not self.copies_early:
                self._copy(copy.transfer)
            completed[copy.transfer.number] = 1
        return completed

    def _update_block_tables(self, output: SchedulerOutput) -> None:
        """As model runners do: blocks are appended, nothing else ever changes."""
        for request_id in output.finished_req_ids:
            self.block_tables.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self.block_tables[new.req_id] = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(
            cached.req_ids, cached.new_block_ids, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self.block_tables[request_id] = []
            if blocks is not None:
                self.block_tables[request_id].extend(blocks[0])

    def _write(self, row: Row) -> None:
        table = self.block_tables[row.request_id]
        end = row.num_computed + row.num_new
        values = self.truth.rows(row.request_id, end)
        for position in range(row.num_computed, end):
            block = table[position // BLOCK]
            self.entries.pop(block, None)
            self.rows.setdefault(block, [POISON] * BLOCK)[position % BLOCK] = values[
                position
            ]
            if (position + 1) % BLOCK == 0:
                self.filled.append(block)

    def _read(self, row: Row) -> None:
        """Finds every page of a row through the tables, as decode does."""
        table = self.block_tables[row.request_id]
        end = row.num_computed + row.num_new
        values = self.truth.rows(row.request_id, end)
        tail = (end - 1) // BLOCK
        slots = [slot for slot, block in self.tails.items() if block == table[tail]]
        assert len(slots) <= 1, "two slots have one tail"
        released = self.released[slots[0]] if slots else {}
        assert row.decodes or not slots, "a row of a prompt has a slot"
        assert end >= self.min_spillable_len or not released, "a dense row"
        for page in range(tail + 1):
            expected = values[page * BLOCK : min((page + 1) * BLOCK, end)]
            if page in released:
                where = released[page]
                found = self.host[where.host_page]
                index = self.entries[where.entry.block][where.entry.number]
                self.num_recalled += 1
            else:
                found = self.rows[table[page]]
                index = self.index.get(table[page])
            assert found[: len(expected)] == expected, (
                f"wrong rows in page {page} of {row}"
            )
            if row.decodes and page < tail:
                assert index == expected[-1], f"wrong index of page {page} of {row}"


class Engine:
    """Steps a scheduler and its workers.

    Attributes:
        scheduler: vLLM's.
        recall: The host tier's decisions.
        books: The host tier's books.
        workers: One a rank.
        orders: Of the last step.
        rows: Of the last step.
        dropped: Kinds of command that are kept from the workers.
        num_preemptions: For want of blocks, so far.
    """

    def __init__(self, scheduler: Scheduler, delay, world_size: int) -> None:
        self.scheduler = scheduler
        self.recall: RecallScheduler = scheduler.connector.recall
        self.books = self.recall.books
        self.manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.pool = scheduler.kv_cache_manager.block_pool
        self.truth = Truth()
        self.workers = [
            Worker(self.truth, delay, self.recall._min_spillable_len, rank == 0)
            for rank in range(world_size)
        ]
        self.orders = Orders()
        self.rows: list[Row] = []
        self.dropped: tuple[type, ...] = ()
        self.num_preemptions = 0
        self._depth = 2 if isinstance(scheduler, AsyncScheduler) else 1
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._prefill_lens: dict[str, int] = {}
        self._num_host_pages = self.books.num_free_host_pages
        self._max_slots = self.books.num_free_slots
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        priority: int = 0,
        resumable: bool = False,
    ) -> Request:
        self.truth.add(request_id, prompt)
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
            arrival_time=float(len(self._prefill_lens)),
            priority=priority,
            block_hasher=self._hasher,
            resumable=resumable,
        )
        self._prefill_lens[request_id] = request.num_tokens
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Schedules and executes a step; with asynchronous scheduling its output is
        processed behind the next one's scheduling."""
        by_reset = set(self.scheduler.reset_preempted_req_ids)
        output = self.scheduler.schedule()
        self.orders = output.kv_connector_metadata
        self.rows = self._rows(output)
        self.num_preemptions += len(set(output.preempted_req_ids or ()) - by_reset)
        kept = [c for c in self.orders.commands if not isinstance(c, self.dropped)]
        orders = Orders(kept, self.orders.reused_blocks, self.orders.transfers)
        done = [worker.execute(output, orders, self.rows) for worker in self.workers]
        self._in_flight.append((output, self._result(output, done)))
        self.check_books()
        if len(self._in_flight) >= self._depth:
            self.scheduler.update_from_output(*self._in_flight.popleft())
            self.check_books()

    def check_books(self) -> None:
        check_books(
            self.books,
            self.manager,
            self.pool,
            self._num_host_pages,
            self._max_slots,
        )

    def drain(self, max_steps: int = 500) -> None:
        """Steps until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests():
                while self._in_flight:
                    self.scheduler.update_from_output(*self._in_flight.popleft())
                if not self.scheduler.has_requests():
                    return
            self.step()
        raise AssertionError("requests are stuck")

    def _rows(self, output: SchedulerOutput) -> list[Row]:
        cached = output.scheduled_cached_reqs
        computed = {
            new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs
        }
        first = set(computed) | set(cached.resumed_req_ids)
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        rows = []
        for request_id, num_new in output.num_scheduled_tokens.items():
            if request_id in first:
                # What was generated before a preemption counts as prompt.
                self._prefill_lens[request_id] = self.scheduler.requests[
                    request_id
                ].num_tokens
            num_computed = computed[request_id]
            decodes = num_computed >= self._prefill_lens[request_id]
            rows.append(Row(request_id, num_computed, num_new, decodes))
        return rows

    def _result(
        self, output: SchedulerOutput, done: list[dict[int, int]]
    ) -> ModelRunnerOutput:
        sampled = [
            []
            if self.scheduler.requests[row.request_id].is_prefill_chunk
            else [self.truth.token(row.request_id, row.num_computed + row.num_new)]
            for row in self.rows
        ]
        # As the executor does it with the ranks' outputs, none of them empty.
        meta = None
        for completed in filter(None, done):
            ack = Acknowledgement(completed)
            meta = ack if meta is None else meta.aggregate(ack)
        return ModelRunnerOutput(
            req_ids=[row.request_id for row in self.rows],
            req_id_to_index={row.request_id: i for i, row in enumerate(self.rows)},
            sampled_token_ids=sampled,
            kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=meta),
        )


def make_engine(
    folder,
    *,
    num_blocks: int,
    delay=lambda: 1,
    world_size: int = 1,
    asynchronous: bool = False,
    policy: str = "fcfs",
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 128,
    caching: bool = True,
    **settings,
) -> Engine:
    """An engine without a model.

    Args:
        folder: Receives a model's config.json.
        num_blocks: Of the pool, the null block included.
        delay: Gives the steps that a copy takes.
        world_size: Ranks.
        asynchronous: Whether to schedule a step ahead.
        policy: "fcfs" or "priority".
        max_num_seqs: vLLM's.
        max_num_batched_tokens: vLLM's.
        max_model_len: vLLM's.
        caching: Of prefixes.
        **settings: Of RecallScheduler, where they are not the usual of tests.
    """
    (folder / "config.json").write_text(json.dumps(LLAMA))
    init_none_hash(sha256)
    settings = {
        "num_host_pages": 64,
        "max_slots": 8,
        "entries_per_block": 3,
        "world_size": world_size,
        "min_spillable_len": 0,
        "watermark": 0.0,
    } | settings
    config = EngineArgs(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=caching,
        scheduling_policy=policy,
        async_scheduling=asynchronous,
        kv_transfer_config=KVTransferConfig(
            kv_connector="RecallConnector",
            kv_connector_module_path="tests.support.recall_engine",
            kv_role="kv_producer",
            kv_connector_extra_config=settings,
        ),
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.bfloat16
    )
    scheduler = (AsyncScheduler if asynchronous else Scheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=False,
    )
    return Engine(scheduler, delay, world_size)
