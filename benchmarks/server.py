# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""`vllm serve` for benchmarks: started, stopped as an operator would, both timed.

The only module that knows how flags depend on the device.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from gpu_timing import gpu_machine
from timing import without_paths

_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_FLAGS = {"cuda": [], "cpu": ["--enforce-eager"]}
_DEVICE_ENV = {"cuda": {}, "cpu": {"VLLM_CPU_KVCACHE_SPACE": "1"}}
DENSE_BACKEND = {"cuda": "FLASH_ATTN", "cpu": "CPU_ATTN"}
STOP_S = 120
"""Seconds after SIGTERM before a server is killed."""
SETTLE_S = 30


def device() -> str:
    """What vLLM runs on here. Starts no CUDA context."""
    return "cuda" if gpu_machine()["gpu"] else "cpu"


@dataclass
class Server:
    """A server that answers.

    Attributes:
        url: Without a path.
        command: What was run, but for host and port.
        log: The server's output.
        start_s: From start to the first healthy answer.
        stop_s: From SIGTERM to the end of the process that got it; None before.
        was_killed: Whether it had not ended ``STOP_S`` later.
        gone_s: From SIGTERM to the end of all that it started.
        left_processes: Names of those that were there ``SETTLE_S`` after it ended.
    """

    process: subprocess.Popen
    url: str
    command: list[str]
    log: Path
    start_s: float
    stop_s: float | None = None
    was_killed: bool = False
    gone_s: float | None = None
    left_processes: list[str] = field(default_factory=list)

    def stop(self) -> None:
        """Sends SIGTERM to the server, not to the processes that it started."""
        if self.stop_s is not None:
            return
        start = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.was_killed = True
        self.stop_s = time.monotonic() - start
        deadline = time.monotonic() + SETTLE_S
        while not self.was_killed:
            self.left_processes = _names_of_session(self.process.pid)
            if not self.left_processes:
                self.gone_s = time.monotonic() - start
                break
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)

    def facts(self) -> dict:
        """What the machine's JSON file says of it."""
        text = self.log.read_text(errors="replace")
        sizes = re.findall(r"KV cache size: ([\d,]+) tokens", text)
        return {
            "command": shlex.join(without_paths(self.command)),
            "kv_tokens": int(sizes[-1].replace(",", "")) if sizes else None,
            "start_s": round(self.start_s, 1),
            "stop_s": self.stop_s and round(self.stop_s, 1),
            "gone_s": self.gone_s and round(self.gone_s, 1),
            "was_killed": self.was_killed,
            "left_processes": self.left_processes,
        }


@contextlib.contextmanager
def running_server(
    model: str, flags: list[str], log: Path, timeout_s: float
) -> Iterator[Server]:
    """Starts ``vllm serve`` on a free port; nothing of it is left behind.

    Args:
        model: A folder with a config.json; weights are random, there is no tokenizer.
        flags: Besides the model and what the device needs.
        log: Receives its output, behind what it has.
        timeout_s: For the first healthy answer.

    Raises:
        SystemExit: It ended, or did not answer in time; with the end of its log.
    """
    here = device()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["serve", model, "--load-format", "dummy", "--skip-tokenizer-init"]
    command += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    command += [*_FLAGS[here], *flags]
    # The module, since the script may be in another folder than the packages. -P: not
    # from the folder that this runs in, as the script.
    vllm = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]
    start = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen(
            [*vllm, *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_DEVICE_ENV[here] | _ENV | os.environ,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_healthy(url):
            if process.poll() is not None:
                raise SystemExit(f"vllm serve ended:\n{_tail(log)}")
            if time.monotonic() - start > timeout_s:
                raise SystemExit(f"no answer after {timeout_s:.0f} s:\n{_tail(log)}")
            time.sleep(0.25)
        seconds = time.monotonic() - start
        server = Server(process, url, ["vllm", *command], log, seconds)
        try:
            yield server
        except Exception:
            print(f"the end of {log.name}:\n{_tail(log)}")
            raise
        server.stop()
    finally:
        # The engine core and the workers are of the same session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _names_of_session(session: int) -> list[str]:
    """Of its processes that have not ended."""
    names = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if is_alive and os.getsid(process.pid) == session:
                names.append(process.name())
    return names


def _tail(log: Path, num_lines: int = 40) -> str:
    """The end, and the errors before it: the engine's come before the server's."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [
        line for line in lines[:-num_lines] if re.search(r"\w(Error|Exception): ", line)
    ]
    return "\n".join(errors + lines[-num_lines:])
