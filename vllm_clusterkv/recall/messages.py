# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What the halves of the host tier tell each other, once a step."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(frozen=True)
class IndexEntry:
    """Where a page's index lies once the page has left its block.

    Attributes:
        block: A block of vLLM's pool that holds nothing but entries.
        number: Of the entry in it.
    """

    block: int
    number: int


@dataclass(frozen=True)
class Transfer:
    """A copy of a page to make: its rows to the host, its index to an entry.

    Attributes:
        number: Counted up from 0, the same on every rank.
        block: The page.
        host_page: Of the host pool.
        entry: Receives the index.
    """

    number: int
    block: int
    host_page: int
    entry: IndexEntry


@dataclass(frozen=True)
class StartSlot:
    """A request got a slot: a row of the worker's tables, empty from here on.

    Attributes:
        slot: Its number.
        hot_blocks: Blocks of vLLM's pool that hold what decode recalls for it.
    """

    slot: int
    hot_blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class ClearSlot:
    """A slot's request has ended or was preempted."""

    slot: int


@dataclass(frozen=True)
class SetTail:
    """The block that receives the slot's current token, by which decode knows it."""

    slot: int
    block: int


@dataclass(frozen=True)
class Release:
    """The block of a slot's page has a new owner: read the copies from this step on."""

    slot: int
    page: int
    host_page: int
    entry: IndexEntry


Command = StartSlot | ClearSlot | SetTail | Release


@dataclass
class Orders(KVConnectorMetadata):
    """From the scheduler to the workers, in the order in which a worker acts.

    Attributes:
        commands: Changes of the tables, in order.
        reused_blocks: Released blocks that have a new owner, to be poisoned by tests.
        transfers: Copies to make, of pages indexed before this step's forward.
    """

    commands: list[Command] = field(default_factory=list)
    reused_blocks: list[int] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)


@dataclass
class Acknowledgement(KVConnectorWorkerMetadata):
    """From the workers: by transfer, how many ranks have completed it."""

    completed: dict[int, int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Acknowledgement":
        assert isinstance(other, Acknowledgement)
        total = dict(self.completed)
        for number, ranks in other.completed.items():
            total[number] = total.get(number, 0) + ranks
        return Acknowledgement(total)
