# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""One vLLM engine a backend, each in a process of its own, one after another.

The engines get the same arguments but for the attention backend and its settings.
Weights are random (load_format="dummy") and prompts are token ids, so a folder with a
model's config.json is all that is needed. Prompts are the same for both.
"""

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from gpu_timing import gpu_machine, gpu_memory_used_mib
from timing import command_line

ROOT = Path(__file__).resolve().parent.parent
_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # collective_rpc of a function, within this machine.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what both engine benchmarks take."""
    add = parser.add_argument
    add("--model", required=True, help="a folder with config.json")
    sides = ["dense", "sparse"]
    add("--sides", nargs="+", choices=sides, default=sides)
    add("--dense-backend", default="FLASH_ATTN")
    add("--token-budget", type=int, default=1024)
    add("--settings", type=json.loads, default={}, help="more for clusterkv, as JSON")
    add("--max-model-len", type=int, help="the model's own if not given")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add(
        "--engine-args",
        type=json.loads,
        default={},
        help="more for LLM(), both sides, as JSON",
    )
    add("--timeout", type=float, default=280, help="seconds a side")
    add("--log-dir", type=Path, help="for the engines' logs; a new one in /tmp if none")
    add("--out", type=Path, default=ROOT / "benchmarks/results", help="folder")
    add("--commit", help="to record, where this is no checkout")
    add("--child", type=Path, help=argparse.SUPPRESS)


def engine_args(args: argparse.Namespace, side: str, **common) -> dict:
    """Arguments of ``LLM``.

    Args:
        args: The command line's.
        side: "dense" or "sparse".
        common: The benchmark's, for both sides.
    """
    both = {
        "model": args.model,
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "gpu_memory_utilization": args.gpu_memory_utilization,
        **common,
        **args.engine_args,
    }
    if args.max_model_len:
        both["max_model_len"] = args.max_model_len
    if side == "dense":
        return both | {"attention_backend": args.dense_backend}
    settings = {"token_budget": args.token_budget} | args.settings
    return both | {
        "attention_backend": "clusterkv",
        "additional_config": {"clusterkv": settings},
    }


def run_sides(
    name: str, script: str, args: argparse.Namespace, common: dict, task: dict
) -> tuple[list[dict], dict[str, dict]]:
    """Runs ``script --child`` for each side, one after another.

    The results are written anew with each row, so that they outlive an interruption.

    Args:
        name: Of the files to write.
        script: The benchmark. With ``--child FILE`` it must call ``run_child``.
        args: The command line's.
        common: Arguments of ``LLM`` for both sides.
        task: For the child, JSON.

    Returns:
        rows: What the children measured, as far as they got.
        facts: What each side's engine says of itself.
    """
    log_dir = args.log_dir or Path(tempfile.mkdtemp(prefix="clusterkv-bench-"))
    log_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    facts: dict[str, dict] = {}
    for side in args.sides:
        work = Path(tempfile.mkdtemp(prefix="clusterkv-bench-"))
        child_file = work / "task.json"
        engine = engine_args(args, side, **common)
        child_file.write_text(json.dumps({"engine": engine, "task": task}))
        log = log_dir / f"engine-{side}.log"
        print(f"{side}: starting the engine, log in {log}", flush=True)
        command = [sys.executable, script, "--model", args.model, "--child"]
        for line in _follow([*command, str(child_file)], log, args.timeout):
            print(f"{side}: {json.dumps(line)}", flush=True)
            if "facts" in line:
                facts[side] = line["facts"]
            elif "left_out" not in line:
                rows.append({"side": side} | line)
                write_results(name, args, rows, facts, common)
        wait_for_memory()
    return rows, facts


def _follow(command: list[str], log: Path, timeout: float) -> Iterator[dict]:
    """Runs a child in a session of its own and yields the lines that it reports."""
    report = Path(command[-1]).with_name("report.jsonl")
    report.touch()
    deadline = time.monotonic() + timeout
    with log.open("w") as log_file, report.open() as lines:
        child = subprocess.Popen(
            command,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=os.environ | _ENV,
            start_new_session=True,
        )
        unfinished = ""
        try:
            while True:
                has_ended = child.poll() is not None
                *whole, unfinished = (unfinished + lines.read()).split("\n")
                yield from map(json.loads, whole)
                if has_ended:
                    break
                if time.monotonic() > deadline:
                    print(f"stopped after {timeout:.0f} s", flush=True)
                    break
                time.sleep(0.2)
        finally:
            # The engine core is a process of the same session.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        print(f"the engine's process ended with {child.returncode}:\n{tail}")


def wait_for_memory(seconds: float = 60, settled: float = 10) -> None:
    """Waits until the last engine's GPU memory is free.

    Where other programs use the GPU: until for ``settled`` seconds no more gets free.
    """
    now = time.monotonic()
    deadline, last_fall, least = now + seconds, now, float("inf")
    while now < deadline and now - last_fall < settled:
        used = gpu_memory_used_mib() or 0
        if used <= 2048:
            return
        if used < least:
            least, last_fall = used, now
        time.sleep(0.5)
        now = time.monotonic()


def run_child(child_file: Path, measure: Callable) -> None:
    """The child's side of ``run_sides``.

    Args:
        child_file: What the parent wrote.
        measure: Called with the engine and the task, yields rows.
    """
    parent = json.loads(child_file.read_text())
    report = child_file.with_name("report.jsonl")
    start = time.perf_counter()
    engine = Engine(parent["engine"])
    facts = engine.facts() | {"start_s": round(time.perf_counter() - start, 1)}
    with report.open("a", buffering=1) as file:
        print(json.dumps({"facts": facts}), file=file)
        for row in measure(engine, parent["task"]):
            print(json.dumps(row), file=file)
    engine.stop()


class Engine:
    """A vLLM engine, step by step."""

    def __init__(self, args: dict) -> None:
        from vllm import LLM

        self._llm = LLM(**args)
        self._engine = self._llm.llm_engine
        self._num_requests = 0

    @property
    def vocab_size(self) -> int:
        return self._engine.model_config.get_vocab_size()

    @property
    def max_model_len(self) -> int:
        return self._engine.model_config.max_model_len

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        cache = self._engine.vllm_config.cache_config
        in_blocks = (cache.num_gpu_blocks or 0) * cache.block_size
        return getattr(cache, "kv_cache_size_tokens", None) or in_blocks

    def facts(self) -> dict:
        """What the engine made of its arguments."""
        config = self._engine.vllm_config
        return {
            **self._llm.collective_rpc(worker_facts)[0],
            "kv_tokens": self.kv_tokens,
            "block_size": config.cache_config.block_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "model_runner_v2": config.use_v2_model_runner,
        }

    def generate(
        self, prompts: list[np.ndarray], num_tokens: int
    ) -> list[tuple[float, dict[str, int]]]:
        """Serves requests together.

        Args:
            prompts: Token ids of each.
            num_tokens: To generate for each.

        Returns:
            Of each step that produced tokens, the second that it ended at, from the
            moment before the requests were added, and the tokens of each request.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.outputs import RequestOutput
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=num_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        inputs = [TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in prompts]
        steps = []
        start = time.perf_counter()
        for prompt in inputs:
            self._engine.add_request(str(self._num_requests), prompt, params)
            self._num_requests += 1
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter() - start
            tokens = {
                output.request_id: len(output.outputs[0].token_ids)
                for output in outputs
                if isinstance(output, RequestOutput)
            }
            if any(tokens.values()):
                steps.append((now, tokens))
        return steps

    def stop(self) -> None:
        shutdown = getattr(self._engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()


def worker_facts(worker) -> dict:
    """In the worker: the attention backend of its layers, and the graph mode."""
    compilation = worker.vllm_config.compilation_config
    backends = {
        layer.attn_backend.get_name()
        for layer in compilation.static_forward_context.values()
        if hasattr(layer, "attn_backend")
    }
    mode = compilation.cudagraph_mode
    return {
        "backend": "+".join(sorted(backends)),
        "cudagraph_mode": getattr(mode, "name", str(mode)),
    }


def random_prompt(row: int, length: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Token ids; a row's shorter prompts begin its longer ones."""
    generator = np.random.default_rng([seed, row])
    return generator.integers(100, vocab_size - 100, length)


def unlike(facts: dict[str, dict]) -> list[str]:
    """What differs between the sides and must not."""
    same = [
        "cudagraph_mode",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "async_scheduling",
        "prefix_caching",
        "model_runner_v2",
    ]
    return [
        f"{key}: {', '.join(f'{side} {found[key]}' for side, found in facts.items())}"
        for key in same
        if len({json.dumps(found[key]) for found in facts.values()}) > 1
    ]


def check_alike(args: argparse.Namespace, facts: dict[str, dict]) -> None:
    """Exits if the sides cannot be compared."""
    if differences := unlike(facts):
        raise SystemExit("NOT COMPARABLE: " + "; ".join(differences))
    if len(facts) < len(args.sides):
        raise SystemExit("an engine did not start")


def write_results(
    name: str,
    args: argparse.Namespace,
    rows: list[dict],
    facts: dict[str, dict],
    common: dict,
) -> None:
    """Writes NAME.csv and NAME.machine.json."""
    info = gpu_machine() | {
        "command": command_line(),
        "engine_args": {side: engine_args(args, side, **common) for side in facts},
        "engines": facts,
    }
    if args.commit:
        info["commit"] = args.commit
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(info, indent=2)
    (args.out / f"{name}.machine.json").write_text(f"{text}\n")
    full = []
    for row in rows:
        side = row["side"]
        found = facts[side]
        full.append(
            {
                "gpu": info["gpu"],
                "model": Path(args.model).name,
                "backend": found["backend"],
                "token_budget": args.token_budget if side == "sparse" else "",
                **{key: value for key, value in row.items() if key != "side"},
                "max_model_len": found["max_model_len"],
                "kv_tokens": found["kv_tokens"],
            }
        )
    with (args.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, full[0])
        writer.writeheader()
        writer.writerows(full)


def draw(plot_name: str, out: Path, stem: str) -> None:
    """Draws ``stem``.csv by a function of plots.py, where matplotlib is installed."""
    try:
        import plots
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    getattr(plots, plot_name)(out / f"{stem}.csv", out / f"{stem}.png")
