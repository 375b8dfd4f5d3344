# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Results on disk: one JSON line a sample and method, and tables made of them."""

import csv
import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import vllm_clusterkv

FIELDS = [
    "model",
    "task",
    "context_len",
    "token_budget",
    "method",
    "score",
    "std_error",
    "samples",
    "attended",
]


def code_fingerprint() -> str:
    """Of the package as installed, kernels included, and of this evaluation.

    Results of one folder are of one code: without it a run that goes on after a change
    would mix methods of the same name.
    """
    digest = hashlib.sha256()
    for folder in (Path(vllm_clusterkv.__file__).parent, Path(__file__).parent):
        for file in sorted([*folder.rglob("*.py"), *folder.glob("*.so")]):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def key_of(
    task: str, context_len: int, index: int, method: str, token_budget: int | None
) -> str:
    """Names a result: one of a key is never computed twice."""
    return f"{task}/{context_len}/{index}/{method}/{token_budget or ''}"


class Results:
    """The results of a folder, which an interrupted run goes on from.

    Attributes:
        records: What was measured, in the order of the file.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        """Opens a folder, new or of an earlier run.

        Args:
            folder: For ``results.jsonl`` and ``settings.json``.
            settings: What must be the same for results to be comparable.

        Raises:
            ValueError: The folder's results are of other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "results.jsonl"
        text = self._file.read_text() if self._file.exists() else ""
        settings_file = folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        # Settings of a run that ended before its first result bind nobody.
        if text and settings_file.exists():
            earlier = json.loads(settings_file.read_text())
            for name in settings:
                if earlier.get(name) != settings[name]:
                    raise ValueError(
                        f"--out {folder} holds results with {name} = "
                        f"{_short(earlier.get(name))}, now it is "
                        f"{_short(settings[name])}: give another folder"
                    )
        else:
            settings_file.write_text(json.dumps(settings, indent=2) + "\n")
        # A line that an interruption cut off is dropped.
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._file.write_text(whole)
        self.records: list[dict] = [json.loads(line) for line in whole.splitlines()]
        self._keys = {record["key"] for record in self.records}

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, record: dict) -> None:
        """Appends a record, which has a "key", to the file."""
        with self._file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)
        self._keys.add(record["key"])


def summarize(records: list[dict], model: str) -> list[dict]:
    """One row a task, context, budget, method and score: mean and standard error.

    Args:
        records: Of ``Results``. "scores" maps names to numbers; "score" is the task's
            own, others become rows of "task/name".
        model: Its name.
    """
    groups: dict[tuple, list[tuple[float, float | None]]] = defaultdict(list)
    for record in records:
        for name, value in record["scores"].items():
            task = record["task"] if name == "score" else f"{record['task']}/{name}"
            where = (task, record["context_len"], record["token_budget"])
            groups[*where, record["method"]].append((value, record.get("attended")))
    rows = []
    for (task, context_len, budget, method), pairs in sorted(
        groups.items(), key=lambda group: [str(part).zfill(9) for part in group[0]]
    ):
        values = [value for value, _ in pairs]
        attended = [count for _, count in pairs if count is not None]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        rows.append(
            {
                "model": model,
                "task": task,
                "context_len": context_len,
                "token_budget": budget or "",
                "method": method,
                "score": round(mean(values), 4),
                "std_error": "" if error is None else round(error, 4),
                "samples": len(values),
                "attended": round(mean(attended), 1) if attended else "",
            }
        )
        if task.endswith("/nll"):
            perplexity = {
                "task": task.removesuffix("nll") + "perplexity",
                "score": round(math.exp(mean(values)), 4),
                "std_error": "",
            }
            rows.append(rows[-1] | perplexity)
    return rows


def less_dense(
    records: list[dict], model: str, tasks: list[str], least: float = 20.0
) -> list[dict]:
    """By how much a method's mean score differs from dense attention's.

    The mean of the tasks that dense solves at ``least`` percent or better, of the same
    samples. What a sample is worth is in both, so the standard error is that of the
    differences, and smaller than the scores' own.

    Args:
        records: Of ``Results``. A method that lacks one of those tasks is left out.
        model: Its name.
        tasks: Those that count.
        least: Percent.

    Returns:
        Rows as of ``summarize``, task ``less_dense/mean of N``, samples of all tasks.
    """
    scores: dict[tuple, dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for record in records:
        if record["task"] in tasks:
            method = (record["method"], record["token_budget"])
            of_task = scores[record["context_len"], *method][record["task"]]
            of_task[record["index"]] = record["scores"]["score"]
    rows = []
    for (context_len, method, budget), found in sorted(
        scores.items(), key=lambda item: [str(part).zfill(9) for part in item[0]]
    ):
        dense = {
            task: of_dense
            for task, of_dense in scores[context_len, "dense", None].items()
            if mean(of_dense.values()) >= least
        }
        if method == "dense" or not dense:
            continue
        pairs = [
            [
                score - dense[task][index]
                for index, score in found[task].items()
                if index in dense[task]
            ]
            for task in dense
        ]
        if min(map(len, pairs)) < 2:
            continue
        variance = sum(stdev(pair) ** 2 / len(pair) for pair in pairs)
        rows.append(
            {
                "model": model,
                "task": f"less_dense/mean of {len(dense)}",
                "context_len": context_len,
                "token_budget": budget or "",
                "method": method,
                "score": round(mean(map(mean, pairs)), 4),
                "std_error": round(math.sqrt(variance) / len(pairs), 4),
                "samples": sum(map(len, pairs)),
                "attended": "",
            }
        )
    return rows


def write_csv(file: Path, rows: list[dict]) -> None:
    """Writes rows of ``summarize`` and ``less_dense``."""
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict], averaged: list[str]) -> str:
    """Text: a line a task and context, a column a method, dense the first.

    Args:
        rows: Of ``summarize`` and ``less_dense``.
        averaged: Tasks whose mean, of each context, is a line of its own.
    """
    columns = sorted(
        {(row["method"], row["token_budget"]) for row in rows},
        key=lambda column: (column[0] != "dense", column[1] or 0, column[0]),
    )
    cells = {
        (row["task"], row["context_len"], row["method"], row["token_budget"]): row
        for row in rows
    }
    lines = [["task", "context", *(f"{m}@{b}" if b else m for m, b in columns)]]
    for task, context_len in dict.fromkeys(
        (row["task"], row["context_len"]) for row in rows
    ):
        found = [cells.get((task, context_len, *column)) for column in columns]
        lines.append([task, f"{context_len:,}", *map(_cell, found)])
    for context_len in sorted({row["context_len"] for row in rows}):
        means = []
        tasks = [
            t for t in averaged if any((t, context_len) == key[:2] for key in cells)
        ]
        for column in columns:
            parts = [cells.get((task, context_len, *column)) for task in tasks]
            scores = [part["score"] for part in parts if part]
            # Of the same tasks, or of none.
            is_whole = scores and len(scores) == len(tasks)
            means.append(f"{mean(scores):.1f}" if is_whole else "-")
        if tasks:
            lines.append([f"RULER, mean of {len(tasks)}", f"{context_len:,}", *means])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    digits = 1 if abs(row["score"]) >= 10 or row["score"] == 0 else 4
    error = f" ±{row['std_error']:.{digits}f}" if row["std_error"] != "" else ""
    return f"{row['score']:.{digits}f}{error}"


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else f"{text[:97]}..."
