"""The offline API: prompts in, completions out. For a server see `minidcp serve`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minidcp.config import EngineConfig, require
from minidcp.engine.engine import LLMEngine
from minidcp.request import CompletionOutput, RequestOutput, SamplingParams

Prompt = str | list[int]
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams]


def as_batch(prompts: Prompts) -> list[Prompt]:
    """One prompt or many: a text or a list of token ids is one."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [p for p in prompts if isinstance(p, int)]
    if ids and len(ids) == len(prompts):
        return [ids]
    batch = [p if isinstance(p, str) else list(p) for p in prompts if isinstance(p, str | list | tuple)]
    require(len(batch) == len(prompts), "prompts: give a text, a list of token ids, or a list of either, not mixed")
    return batch


class LLM(AbstractContextManager["LLM"]):
    """A DeepSeek-V2 model on `tp_size` ranks whose KV cache is interleaved over groups of `dcp_size`: `model` is a
    checkpoint directory or a name on the Hugging Face hub, `options` are the fields of `EngineConfig`. Raises
    ValueError if an option or the checkpoint is wrong, and from `generate` too EngineDeadError if a rank ended. Under
    torchrun every process constructs this; only rank 0's constructor returns, the others serve as ranks and end."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        known = ["model", *(f.name for f, _ in EngineConfig.options())]
        unknown = sorted(set(options) - set(known))
        require(not unknown, f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
        self.engine = LLMEngine(EngineConfig(str(model), **options))
        self.num_requests = 0

    def generate(
        self, prompts: Prompts, sampling_params: Params | None = None, use_tqdm: bool = False
    ) -> list[RequestOutput]:
        """Complete every prompt (text, or token ids); outputs are in the prompts' order."""
        batch, params = as_batch(prompts), sampling_params if sampling_params is not None else SamplingParams()
        each = [params] * len(batch) if isinstance(params, SamplingParams) else list(params)
        require(len(each) == len(batch), f"sampling_params: {len(each)} for {len(batch)} prompts; give one or as many")
        outputs: dict[str, RequestOutput] = {}
        try:
            for prompt, p in zip(batch, each, strict=True):
                request_id = f"llm-{self.num_requests}"
                self.num_requests += 1
                request = self.engine.add_request(request_id, prompt, p)
                completion = CompletionOutput(logprobs=None if p.logprobs is None else [])
                text = prompt if isinstance(prompt, str) else None
                outputs[request_id] = RequestOutput(request_id, text, request.prompt_token_ids, [completion])
            self.run(outputs, use_tqdm)
        finally:
            self.engine.abort(*outputs)  # those left over by an error
        return list(outputs.values())

    def run(self, outputs: dict[str, RequestOutput], use_tqdm: bool) -> None:
        generated = 0
        with tqdm(total=len(outputs), desc="Requests", unit="req", disable=not use_tqdm) as bar:
            while self.engine.has_work:
                for delta in self.engine.step():
                    output, completion = outputs[delta.request_id], outputs[delta.request_id].outputs[0]
                    completion.text += delta.text
                    completion.token_ids += delta.token_ids
                    if completion.logprobs is not None and delta.logprobs is not None:
                        completion.logprobs.append(delta.logprobs)
                    output.cached_tokens = delta.cached_tokens
                    output.prompt_logprobs = delta.prompt_logprobs or output.prompt_logprobs
                    generated += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        completion.finish_reason = delta.finish_reason.value
                        bar.update()
                    bar.set_postfix_str(f"{generated / (bar.format_dict['elapsed'] or 1):.1f} tok/s", refresh=False)

    def close(self) -> None:
        """End the ranks and free what they hold; safe to call twice."""
        self.engine.close()

    def __exit__(self, *_: object) -> None:
        self.close()
