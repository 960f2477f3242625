"""The offline API: prompts in, completions out. Next: the server, from `server/protocol.py` on."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minidcp.config import EngineConfig, require
from minidcp.console import UnfailingStream
from minidcp.engine.engine import LLMEngine
from minidcp.request import CompletionOutput, OutputDelta, RequestOutput, SamplingParams

Prompt = str | list[int]
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams]


class LLM(AbstractContextManager["LLM"]):
    """A DeepSeek-V2 model on `tp_size` ranks, with its KV cache spread over groups of `dcp_size`.

    `model` is a checkpoint directory or a name on the Hugging Face hub. `options` are the fields of
    `EngineConfig`. Raises ValueError if an option or the checkpoint is wrong; `generate` also
    raises EngineDeadError if a rank ended. Under torchrun every process constructs this, but the
    constructor returns only on rank 0: the other processes serve as ranks and end.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        known = ["model"]
        known += [f.name for f, _ in EngineConfig.options()]
        unknown = sorted(set(options) - set(known))
        require(not unknown, f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
        self.engine = LLMEngine(EngineConfig(str(model), **options))
        self.num_requests = 0

    def generate(
        self, prompts: Prompts, sampling_params: Params | None = None, use_tqdm: bool = False
    ) -> list[RequestOutput]:
        """Complete every prompt (text, or token ids). Outputs are in the order of the prompts."""
        batch = as_batch(prompts)
        params = list_params(sampling_params, len(batch))

        outputs: dict[str, RequestOutput] = {}
        try:
            for prompt, prompt_params in zip(batch, params, strict=True):
                output = self.add_request(prompt, prompt_params)
                outputs[output.request_id] = output
            self.run(outputs, use_tqdm)
        finally:
            self.engine.abort(*outputs)  # what an error has left unfinished
        return list(outputs.values())

    def add_request(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        """Queue a prompt; returns its output, which is still empty."""
        request_id = f"llm-{self.num_requests}"
        self.num_requests += 1
        request = self.engine.add_request(request_id, prompt, params)
        return RequestOutput(
            request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[CompletionOutput(logprobs=None if params.logprobs is None else [])],
        )

    def run(self, outputs: dict[str, RequestOutput], use_tqdm: bool) -> None:
        """Step the engine until all requests are finished, and add to their outputs."""
        num_generated = 0
        with tqdm(
            total=len(outputs),
            desc="Requests",
            unit="req",
            disable=not use_tqdm,
            file=UnfailingStream(sys.stderr),
        ) as bar:
            while self.engine.has_work:
                for delta in self.engine.step():
                    extend_output(outputs[delta.request_id], delta)
                    num_generated += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        bar.update()
                    seconds = bar.format_dict["elapsed"] or 1
                    bar.set_postfix_str(f"{num_generated / seconds:.1f} tok/s", refresh=False)

    def close(self) -> None:
        """End the ranks and free what they hold; safe to call twice."""
        self.engine.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def as_batch(prompts: Prompts) -> list[Prompt]:
    """A list of prompts from one or several. A list of token ids is one prompt, like a text."""
    if isinstance(prompts, str):
        return [prompts]
    token_ids = [p for p in prompts if isinstance(p, int)]
    if token_ids and len(token_ids) == len(prompts):
        return [token_ids]

    batch: list[Prompt] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            batch.append(prompt)
        elif isinstance(prompt, list | tuple):
            batch.append(list(prompt))
    require(
        len(batch) == len(prompts),
        "prompts: give a text, a list of token ids, or a list of either, not mixed",
    )
    return batch


def list_params(params: Params | None, num_prompts: int) -> list[SamplingParams]:
    """The sampling parameters of each prompt."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    by_prompt = list(params)
    require(
        len(by_prompt) == num_prompts,
        f"sampling_params: {len(by_prompt)} for {num_prompts} prompts; give one or as many",
    )
    return by_prompt


def extend_output(output: RequestOutput, delta: OutputDelta) -> None:
    """Add what one step brought to a request's output."""
    output.cached_tokens = delta.cached_tokens
    if delta.prompt_logprobs:
        output.prompt_logprobs = delta.prompt_logprobs

    completion = output.outputs[0]
    completion.text += delta.text
    completion.token_ids += delta.token_ids
    if completion.logprobs is not None and delta.logprobs is not None:
        completion.logprobs.append(delta.logprobs)
    if delta.finish_reason is not None:
        completion.finish_reason = delta.finish_reason.value
