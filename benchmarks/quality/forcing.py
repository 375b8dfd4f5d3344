# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Making a vLLM engine decode given tokens, one a step, while it says what it thinks.

Log-probabilities remain the model's, before anything is forced. On GPUs vLLM's trace
replay does this; it needs Model Runner V2, which CPUs lack, so there a logits processor
forbids every other token. Both leave the attention backend, and the steps that it sees,
as in free decoding.
"""

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "clusterkv_forced"


class ForceTokens(AdapterLogitsProcessor):
    """Forces the tokens in a request's ``extra_args[KEY]``, then lets it go on."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        forced = (params.extra_args or {}).get(KEY)
        if forced is None:
            return None

        def force(output_ids: list[int], logits):
            if len(output_ids) < len(forced):
                token = forced[len(output_ids)]
                kept = logits[token].clone()
                logits.fill_(float("-inf"))
                logits[token] = kept
            return logits

        return force


def engine_args(is_cuda: bool) -> dict:
    """Arguments of ``LLM`` that forcing needs."""
    if is_cuda:
        return {"enable_trace_replay": True}
    return {"logits_processors": [ForceTokens], "async_scheduling": False}


def let_traces_end() -> None:
    """Lets a request go on freely behind its trace, where vLLM would end it.

    The sampler forces no token behind the trace's last; only the input processor cuts
    ``max_tokens`` to the trace's length.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    def keep(self, params, num_tokens) -> None:
        """Leaves ``max_tokens`` as it is."""

    if not hasattr(InputProcessor, "_normalize_trace_replay_params"):
        raise RuntimeError(
            "this vLLM prepares traces otherwise: forcing.py must follow"
        )
    InputProcessor._normalize_trace_replay_params = keep  # type: ignore


def forced_params(is_cuda: bool, forced: list[int], **params) -> SamplingParams:
    """Greedy sampling that begins with given tokens, end-of-text tokens included.

    Args:
        is_cuda: Whether the engine runs on a GPU.
        forced: Token ids.
        params: More of ``SamplingParams``.
    """
    how = (
        {"trace_decode_token_ids": forced} if is_cuda else {"extra_args": {KEY: forced}}
    )
    return SamplingParams(
        temperature=0, ignore_eos=True, **(how if forced else {}), **params
    )
