# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Shows which clusters a prompt's decode selects, and what they carry.

    python -m vllm_clusterkv.explain --model MODEL --prompt-file FILE

or, from Python, ``print(explain("MODEL", "...", token_budget=512).summary())``.
``docs/explain.md`` explains the output.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_clusterkv.attention_probe import AttentionProbe
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.explanation import Explanation

if TYPE_CHECKING:
    from vllm import LLM


def explain(
    model: str,
    prompt: str | Sequence[int],
    *,
    num_steps: int = 1,
    chat: bool = False,
    max_model_len: int | None = None,
    **settings: Any,
) -> Explanation:
    """Starts vLLM, runs a prompt and says what its decode attended to.

    vLLM runs in this process and changes its threads and environment: best called
    in a process of its own. To explain several prompts with one start, use ``load``
    and ``explain_prompt``.

    Args:
        model: Name or path, as for ``vllm serve``.
        prompt: Text or token ids.
        num_steps: Decode steps to look at. The first one computes the second token
            of the answer: prefill, which is dense, computes the first.
        chat: Whether to put the prompt, a text, into the model's chat template.
        max_model_len: Longest context in tokens; None for the model's.
        **settings: ``ClusterKVConfig``'s, such as ``token_budget``. ``min_sparse_len``
            is 0 by default, so that contexts of every length select.

    Raises:
        ValueError: A wrong setting, or a prompt that does not fit ``max_model_len``.
    """
    with load(model, max_model_len=max_model_len, **settings) as llm:
        return explain_prompt(llm, prompt, num_steps=num_steps, chat=chat)


@contextmanager
def load(
    model: str, *, max_model_len: int | None = None, **settings: Any
) -> Iterator["LLM"]:
    """A vLLM whose layers ``explain_prompt`` can observe, for a ``with`` block.

    Args:
        model: As ``explain``.
        max_model_len: As ``explain``.
        **settings: As ``explain``.

    Raises:
        ValueError: A wrong setting, or a model that the backend does not support, or
            vLLM is not on its CPU platform.
    """
    settings = {"min_sparse_len": 0, **settings}
    ClusterKVConfig.from_additional_config({"clusterkv": settings})
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ValueError(
            "explain must run with vLLM for CPUs, where each layer indexes its pages "
            f"in sight, got vLLM for {current_platform.device_name}"
        )
    # Only an engine in this process calls the observers of this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(
            model,
            attention_backend="clusterkv",
            additional_config={"clusterkv": settings},
            max_model_len=max_model_len,
            max_num_seqs=1,
            enforce_eager=True,
            enable_prefix_caching=False,  # every page is to be indexed in sight
            use_tqdm_on_load=False,
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
    finally:
        cleanup_dist_env_and_memory()
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]


def explain_prompt(
    llm: "LLM", prompt: str | Sequence[int], *, num_steps: int = 1, chat: bool = False
) -> Explanation:
    """Runs a prompt and says what its decode attended to.

    Args:
        llm: From ``load``.
        prompt: As ``explain``.
        num_steps: As ``explain``.
        chat: As ``explain``.

    Raises:
        ValueError: The prompt is empty or does not fit the model's length.
    """
    from vllm import SamplingParams

    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    tokenizer = llm.get_tokenizer()
    prompt_ids = _encode(tokenizer, prompt, chat)
    vllm_config = llm.llm_engine.vllm_config
    max_model_len = vllm_config.model_config.max_model_len
    if not 0 < len(prompt_ids) <= max_model_len - num_steps - 1:
        raise ValueError(
            f"prompt must be 1 to {max_model_len - num_steps - 1} tokens long "
            f"(max_model_len {max_model_len}, less {num_steps + 1} to generate), "
            f"got {len(prompt_ids)}"
        )
    with AttentionProbe(len(prompt_ids)) as probe:
        [request] = llm.generate(
            {"prompt_token_ids": prompt_ids},
            SamplingParams(temperature=0, max_tokens=num_steps + 1, ignore_eos=True),
            use_tqdm=False,
        )
    if not probe.heads:
        raise RuntimeError(
            "no decode step was observed: the LLM must run in this process, with "
            "--attention-backend clusterkv, as load() starts it"
        )
    return Explanation(
        vllm_config.model_config.model,
        ClusterKVConfig.from_additional_config(vllm_config.additional_config),
        _token_texts(tokenizer, [*prompt_ids, *request.outputs[0].token_ids]),
        len(prompt_ids),
        probe.heads,
    )


def _encode(tokenizer: Any, prompt: str | Sequence[int], chat: bool) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if not chat:
        return tokenizer.encode(prompt)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat must be false for this model: it has no chat template")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
    )
    return tokenizer.encode(text, add_special_tokens=False)


def _token_texts(tokenizer: Any, token_ids: list[int]) -> list[str]:
    """Text of each token; a character of several tokens is the last one's."""
    texts: list[str] = []
    done = 0  # tokens whose text is complete
    for end in range(1, len(token_ids) + 1):
        # From a few tokens before: a tokenizer may drop the first one's space.
        start = max(done - 4, 0)
        before = tokenizer.decode(token_ids[start:done])
        text = tokenizer.decode(token_ids[start:end])[len(before) :]
        if text.endswith("\ufffd") and end < len(token_ids):
            texts.append("")
        else:
            texts.append(text)
            done = end
    return texts


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a readable UTF-8 text file, got {path!r} ({error})"
        ) from error


def _check_view(model: str, layer: int | None, kv_head: int | None) -> None:
    """Checks what needs no weights, before the minute that the rest takes."""
    from transformers import AutoConfig

    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ValueError(
            f"argument --model: must be a folder or a name on a hub, got {model}"
        )
    config = AutoConfig.from_pretrained(model)
    for flag, value, count in (
        ("--layer", layer, config.num_hidden_layers),
        ("--kv-head", kv_head, getattr(config, "num_key_value_heads", None)),
    ):
        if value is not None and count and not 0 <= value < count:
            raise ValueError(f"argument {flag}: must be 0 to {count - 1}, got {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_clusterkv.explain",
        description="Shows which clusters a prompt's decode selects, and how much of "
        "the attention mass they carry.",
    )
    add = parser.add_argument
    add("--model", required=True, help="name or path, as for vllm serve")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the prompt")
    prompt.add_argument(
        "--prompt-file",
        dest="prompt",
        type=_text_of,
        metavar="FILE",
        help="a text file with the prompt",
    )
    add("--chat", action="store_true", help="put it into the model's chat template")
    number: dict[str, Any] = {"type": _positive_int, "metavar": "N"}
    defaults = ClusterKVConfig()
    add(
        "--token-budget",
        default=defaults.token_budget,
        help="default %(default)s",
        **number,
    )
    add(
        "--tokens-per-cluster",
        type=int,
        choices=(8, 16, 32),
        default=defaults.tokens_per_cluster,
        help="default %(default)s",
    )
    add("--num-steps", default=1, help="decode steps to look at; default 1", **number)
    add("--max-model-len", help="longest context; default the model's", **number)
    add("--layer", type=int, metavar="N", help="show this layer, not the worst")
    add("--kv-head", type=int, metavar="N", help="show this KV head, not the worst")
    add("--json", type=Path, metavar="FILE", help="write everything to this file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.prompt:
        parser.error("the prompt must hold at least one token, got an empty text")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"argument --json: must be in an existing folder, got {args.json}")
    # Its progress is not what was asked for. Read when vLLM is first imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        _check_view(args.model, args.layer, args.kv_head)
        explanation = explain(
            args.model,
            args.prompt,
            num_steps=args.num_steps,
            chat=args.chat,
            max_model_len=args.max_model_len,
            token_budget=args.token_budget,
            tokens_per_cluster=args.tokens_per_cluster,
        )
        print(explanation.summary(args.layer, args.kv_head))
        if args.json is not None:
            args.json.write_text(json.dumps(explanation.to_json()), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
