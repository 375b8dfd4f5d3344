# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""`vllm serve` as a context manager, for the demo and the tests."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SERVED_MODEL_NAME = "smollm2"


@dataclass
class VllmServer:
    """A server that answers.

    Attributes:
        base_url: For an OpenAI client.
        command: What was run, as a user would type it.
        log: The server's output.
        seconds_to_ready: From start to the first healthy answer.
    """

    base_url: str
    command: str
    log: Path
    seconds_to_ready: float


@contextlib.contextmanager
def vllm_server(
    model: str, log: Path, *args: str, timeout_s: float = 300
) -> Iterator[VllmServer]:
    """Starts `vllm serve MODEL ARGS` on a free port and stops it in the end.

    Raises:
        RuntimeError: The server ended, or did not answer in time; with the end of
            its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The script beside this interpreter, so that an environment need not be active.
    vllm = shutil.which("vllm", path=str(Path(sys.executable).parent)) or "vllm"
    command = ["serve", model, "--served-model-name", SERVED_MODEL_NAME, *args]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
    }
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [vllm, *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_healthy(url):
            if process.poll() is not None:
                raise RuntimeError(f"vllm serve ended:\n{_tail(log)}")
            if time.monotonic() - start > timeout_s:
                raise RuntimeError(f"no answer after {timeout_s:.0f} s:\n{_tail(log)}")
            time.sleep(0.25)
        yield VllmServer(
            base_url=f"{url}/v1",
            command=shlex.join(["vllm", *command]),
            log=log,
            seconds_to_ready=time.monotonic() - start,
        )
    finally:
        _stop(process)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen) -> None:
    """Ends the server and every process it started."""
    for signum, wait_s in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            return


def _tail(log: Path, num_lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
