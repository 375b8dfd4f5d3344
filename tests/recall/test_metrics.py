# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What the periodic log line says of the host tier."""

from vllm_clusterkv.recall.metrics import RecallStats


def worker_stats(found, recalled, left, calls=4, seconds=0.0, mass=0.0, samples=0):
    return RecallStats(
        data={
            "found": found,
            "recalled": recalled,
            "left": left,
            "recalled_bytes": recalled * 2**12,
            "calls": calls,
            "recall_seconds": seconds,
            "mass": mass,
            "mass_samples": samples,
        }
    )


def test_levels_are_the_last_ones_and_counts_add_up():
    total = RecallStats(data={"num_released": 3, "total_released": 3})
    total.aggregate(RecallStats(data={"num_released": 2, "total_released": 1}))
    total.aggregate(worker_stats(60, 30, 10, seconds=2e-4, mass=1.5, samples=2))
    total.aggregate(worker_stats(100, 0, 0, seconds=0))
    assert total.reduce() == {
        "released pages": 2,
        "just released": 4,
        "hot cache hit rate": 0.8,
        "MiB recalled": 0.1,
        "us a recall": 25.0,
        "attention covered": 0.75,
    }


def test_what_did_not_come_is_not_said():
    assert worker_stats(0, 0, 0, calls=0).reduce() == {}
    released = RecallStats(data={"num_released": 0})
    assert released.reduce() == {"released pages": 0}
