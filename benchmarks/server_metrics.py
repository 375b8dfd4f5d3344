# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What a vLLM server says on /metrics, and the rate of its decode read from that."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

RUNNING = "vllm:num_requests_running"
PREEMPTIONS = "vllm:num_preemptions_total"
CACHED = "vllm:prompt_tokens_cached_total"
RELEASED = "vllm:clusterkv_host_page_releases_total"
LINES = {
    name: f"vllm:clusterkv_host_{name}_lines_total"
    for name in ("found", "recalled", "left")
}
_GENERATED = "vllm:generation_tokens_total"
_FIRST_TOKENS = "vllm:time_to_first_token_seconds_count"
_FINISHED = "vllm:request_success_total"
MIN_DECODE_S = 1.0
"""Seconds that so many requests must have decoded for to count."""


@dataclass(frozen=True)
class Sample:
    """Metrics at a moment: by name, the sum over labels."""

    time_s: float
    values: dict[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0)


def parse(text: str) -> dict[str, float]:
    """Metrics in Prometheus' text format, without their labels."""
    values: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if line.startswith("vllm:"):
            name, _, rest = line.partition("{")
            values[name] += float(rest.rpartition(" ")[2])
    return dict(values)


@dataclass(frozen=True)
class DecodeRate:
    """Of the steps in which so many requests decoded, and none had a prompt computed.

    Attributes:
        num_requests: That decoded.
        seconds: For how long, all spans together.
        tokens_per_s: They got.
    """

    num_requests: int
    seconds: float
    tokens_per_s: float


def decode_rate(
    samples: Iterable[Sample], min_seconds: float = MIN_DECODE_S
) -> DecodeRate | None:
    """Tokens a second while the most requests decoded and no prompt was computed.

    Between two samples nothing but decode ran if no request got its first token or its
    last, none was preempted, and at both ends as many run as have their first token
    and not their last. Spans like that with the same number of requests are added up;
    the largest number that has ``min_seconds`` counts. (A preempted request that comes
    back looks as if it decoded, while its prompt is computed again.)

    Args:
        samples: In their order, the first of an idle server.
        min_seconds: See above.

    Returns:
        None if no number has so many seconds.
    """
    samples = list(samples)
    seconds: dict[int, float] = defaultdict(float)
    tokens: dict[int, float] = defaultdict(float)
    same = (RUNNING, PREEMPTIONS, _FIRST_TOKENS, _FINISHED)
    first = samples[0]
    for before, after in zip(samples, samples[1:], strict=False):
        begun = before[_FIRST_TOKENS] - first[_FIRST_TOKENS]
        decoding = begun - (before[_FINISHED] - first[_FINISHED])
        if decoding < 1 or decoding != before[RUNNING]:
            continue
        if any(before[name] != after[name] for name in same):
            continue
        seconds[int(decoding)] += after.time_s - before.time_s
        tokens[int(decoding)] += after[_GENERATED] - before[_GENERATED]
    enough = [number for number, span in seconds.items() if span >= min_seconds]
    if not enough:
        return None
    most = max(enough)
    return DecodeRate(most, seconds[most], tokens[most] / seconds[most])
