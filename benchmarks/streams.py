# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A client of /v1/completions that notes when tokens arrive, and samples /metrics.

`vllm bench serve` measures the same latencies, with prompts that it makes by a
tokenizer and without a look at the server's state; its start alone takes 20 s.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import numpy as np
from server_metrics import Sample, parse

SAMPLE_S = 0.25


@dataclass
class Stream:
    """What the client saw of a request, in seconds of ``time.perf_counter``.

    Attributes:
        sent_s: When it was sent.
        arrivals: Of each piece of the answer, when it came, and the tokens so far.
    """

    sent_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0]

    @property
    def last_s(self) -> float:
        return self.arrivals[-1][0]

    @property
    def num_tokens(self) -> int:
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time from the first token to the last, over the tokens behind the first."""
        first_tokens = self.arrivals[0][1]
        return (self.last_s - self.first_s) / (self.num_tokens - first_tokens)


@dataclass
class Crowd:
    """Requests to serve.

    Attributes:
        model: As the server names it.
        prompts: Token ids of each.
        output_len: Tokens to generate for each.
        concurrency: At once, at most.
    """

    model: str
    prompts: list[np.ndarray]
    output_len: int
    concurrency: int

    def bodies(self) -> list[bytes]:
        """What is posted, of each request."""
        options = {"include_usage": True, "continuous_usage_stats": True}
        common = {
            "model": self.model,
            "max_tokens": self.output_len,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": options,
        }
        return [
            json.dumps(common | {"prompt": prompt.tolist()}).encode()
            for prompt in self.prompts
        ]


def serve(url: str, crowd: Crowd) -> tuple[list[Stream], list[Sample]]:
    """Sends the requests as fast as the concurrency allows.

    Returns:
        streams: Of the requests.
        samples: Of the server's metrics, one before, one after, and one each
            ``SAMPLE_S`` between.

    Raises:
        RuntimeError: A request failed, or its answer has another length.
    """
    return asyncio.run(_serve(url, crowd))


def stop_under_load(url: str, crowd: Crowd, stop: Callable[[], None]) -> int:
    """Calls ``stop`` while requests decode, at least one of them.

    Returns:
        Requests that had not got all of their tokens.
    """
    return asyncio.run(_stop_under_load(url, crowd, stop))


def max_decoding(streams: list[Stream]) -> int:
    """Requests that had their first token and not yet their last, at most at once."""
    # At the same moment, ends come first.
    changes = [(stream.first_s, 1) for stream in streams]
    changes += [(stream.last_s, -1) for stream in streams]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


async def _serve(url: str, crowd: Crowd) -> tuple[list[Stream], list[Sample]]:
    streams = [Stream() for _ in crowd.prompts]
    bodies = crowd.bodies()
    async with _session(url) as session:
        samples = [await _sample(session)]
        sampler = asyncio.create_task(_keep_sampling(session, samples))
        turns = asyncio.Semaphore(crowd.concurrency)
        async with asyncio.TaskGroup() as group:
            for stream, body in zip(streams, bodies, strict=True):
                group.create_task(_complete(session, turns, stream, body))
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler
        samples.append(await _sample(session))
    for stream in streams:
        if stream.num_tokens != crowd.output_len:
            raise RuntimeError(
                f"a request got {stream.num_tokens} tokens instead of "
                f"{crowd.output_len}"
            )
    return streams, samples


async def _stop_under_load(url: str, crowd: Crowd, stop: Callable[[], None]) -> int:
    streams = [Stream() for _ in crowd.prompts]
    async with _session(url) as session:
        turns = asyncio.Semaphore(crowd.concurrency)
        tasks = [
            asyncio.create_task(_complete(session, turns, stream, body))
            for stream, body in zip(streams, crowd.bodies(), strict=True)
        ]
        while not any(stream.num_tokens > 1 for stream in streams):
            await asyncio.sleep(0.01)
            for task in tasks:
                if task.done():
                    task.result()  # raises if it failed
        await asyncio.to_thread(stop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return sum(stream.num_tokens < crowd.output_len for stream in streams)


def _session(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        timeout=aiohttp.ClientTimeout(total=None),
        connector=aiohttp.TCPConnector(limit=0),
    )


async def _complete(
    session: aiohttp.ClientSession,
    turns: asyncio.Semaphore,
    stream: Stream,
    body: bytes,
) -> None:
    headers = {"Content-Type": "application/json"}
    async with turns:
        stream.sent_s = time.perf_counter()
        post = session.post("/v1/completions", data=body, headers=headers)
        async with post as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {await response.text()}")
            async for line in response.content:
                now = time.perf_counter()
                data = line.decode().removeprefix("data: ").strip()
                if not data or data == "[DONE]":
                    continue
                piece = json.loads(data)
                if "choices" not in piece:
                    raise RuntimeError(f"the server answered {data}")
                if piece["choices"]:  # the last piece, of the usage, has none
                    tokens = piece["usage"]["completion_tokens"]
                    stream.arrivals.append((now, tokens))


async def _sample(session: aiohttp.ClientSession) -> Sample:
    start = time.perf_counter()
    async with session.get("/metrics") as response:
        text = await response.text()
    return Sample((start + time.perf_counter()) / 2, parse(text))


async def _keep_sampling(session: aiohttp.ClientSession, samples: list[Sample]) -> None:
    while True:
        await asyncio.sleep(SAMPLE_S)
        samples.append(await _sample(session))
