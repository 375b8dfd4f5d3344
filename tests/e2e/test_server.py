# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""`vllm serve --attention-backend clusterkv` behind the OpenAI API, as users run it.

The server's processes are spawned, so this is also the test of the plugin surviving
the pickling of vLLM's configuration.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from tools.vllm_server import SERVED_MODEL_NAME, vllm_server

FLAGS = ["--max-model-len", "4096", "--enforce-eager"]


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "serve.log"
    settings = json.dumps({"clusterkv": {"token_budget": 256}})
    with vllm_server(
        model_path,
        log,
        *FLAGS,
        "--attention-backend",
        "clusterkv",
        "--additional-config",
        settings,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=server.base_url, api_key="none")


def test_one_line_says_what_runs(server):
    [line] = re.findall(r"Using CLUSTERKV attention: .*", server.log.read_text())
    assert line == (
        "Using CLUSTERKV attention: pages of 256 tokens, 8 tokens a cluster, budget "
        "256 tokens with tail estimate, index overhead 4.2% of the KV cache."
    )


def test_streamed_chat_finds_the_hidden_fact(client, tokenizer, text_ids):
    fact = "The best thing to do in San Francisco is to eat a sandwich in Dolores Park."
    before, after = (
        tokenizer.decode(text_ids[:900]),
        tokenizer.decode(text_ids[900:1800]),
    )
    stream = client.chat.completions.create(
        model=SERVED_MODEL_NAME,
        messages=[
            {
                "role": "user",
                "content": f"{before}\n\n{fact}\n\n{after}\n\n"
                "What is the best thing to do in San Francisco?",
            }
        ],
        max_tokens=32,
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "Dolores Park" in "".join(pieces)
    assert len(pieces) > 10


def test_concurrent_requests_of_mixed_length(client, text_ids):
    def complete(num_tokens):
        return client.completions.create(
            model=SERVED_MODEL_NAME,
            prompt=text_ids[2000 : 2000 + num_tokens],
            max_tokens=12,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True},
        ).choices[0]

    lengths = [1, 255, 256, 257, 600, 1100]
    with ThreadPoolExecutor(len(lengths)) as pool:
        choices = list(pool.map(complete, lengths))
    for choice in choices:
        assert len(choice.logprobs.token_logprobs) == 12
        assert all(p <= 0 for p in choice.logprobs.token_logprobs)


def test_refusal_ends_the_server_with_its_reason(model_path, tmp_path):
    flags = [*FLAGS, "--attention-backend", "clusterkv", "--block-size", "16"]
    with (
        pytest.raises(RuntimeError, match="--block-size must be 256, got 16"),
        vllm_server(model_path, tmp_path / "serve.log", *flags),
    ):
        pass
