"""The offline API: prompts in, completions out. Next: the server, from `server/protocol.py` on."""

import queue
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from minidcp.config import EngineConfig, require
from minidcp.console import ProgressBar, UnfailingStream
from minidcp.engine.engine import LLMEngine
from minidcp.engine.engine_thread import Call, EngineThread, Prompt
from minidcp.engine.grammar import CompiledGrammar
from minidcp.request import RequestOutput, SamplingParams

# A text, token ids, or vLLM's dicts {"prompt": text} and {"prompt_token_ids": token ids}. Arrays of
# NumPy or torch are as good as lists.
PromptInput = str | Sequence[int] | Mapping[str, Any]
Prompts = PromptInput | Sequence[PromptInput]
Params = SamplingParams | Sequence[SamplingParams]

PROMPT_KEYS = {"prompt", "prompt_token_ids"}
BAR_SECONDS = 0.1  # between two looks at the progress


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
        self.engine_thread = EngineThread(self.engine)
        try:
            self.engine_thread.start()
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: Prompts, sampling_params: Params | None = None, use_tqdm: bool = False
    ) -> list[RequestOutput]:
        """Complete every prompt. Outputs are in the order of the prompts.

        A prompt is a text, a list of token ids, or a dict with one of these as `prompt` or
        `prompt_token_ids`. Several threads may call this at the same time; their prompts run
        together. An interrupt (Ctrl-C) ends the call and aborts its prompts, and the engine stays
        as good as before. Without `sampling_params` the checkpoint's defaults hold. Raises
        ValueError if a prompt or a parameter is wrong, EngineDeadError if a rank has ended or takes
        longer than `engine_timeout` for a step.
        """
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        batch = [read_prompt(prompt) for prompt in split_prompts(prompts)]
        params = list_params(sampling_params, len(batch))
        grammars = self.compile_grammars(params)  # held until the engine's thread has found them
        call = Call(batch, params)
        try:
            self.engine_thread.submit(call)
            error = show_progress(call) if use_tqdm else call.outcome.get()
        finally:
            call.is_abandoned = True  # if it was interrupted; else it has ended
            del grammars
        if error is not None:
            raise error
        return list(call.outputs.values())

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json says about sampling; see the option
        `generation_config`."""
        return SamplingParams(**self.engine.sampling_defaults)

    def compile_grammars(self, params: list[SamplingParams]) -> list[CompiledGrammar]:
        """Raises ValueError if one is wrong."""
        compile_later = self.engine.grammars.compile_later
        wanted = [p.structured_outputs for p in params]
        return [compile_later(grammar).result() for grammar in wanted if grammar is not None]

    def close(self) -> None:
        """End the ranks and free what they hold; safe to call twice."""
        self.engine.close()
        self.engine_thread.stop()

    def __exit__(self, *_: object) -> None:
        self.close()


def show_progress(call: Call) -> BaseException | None:
    """Wait for a call and show a progress bar. Returns the call's outcome."""
    file = UnfailingStream(sys.stderr)
    with ProgressBar(total=len(call.prompts), desc="Requests", unit="req", file=file) as bar:
        error = None
        is_running = True
        while is_running:
            try:
                error = call.outcome.get(timeout=BAR_SECONDS)
                is_running = False
            except queue.Empty:
                pass
            seconds = bar.format_dict["elapsed"] or 1
            bar.set_postfix_str(f"{call.num_tokens / seconds:.1f} tok/s", refresh=False)
            bar.update(call.num_finished - bar.n)
    return error


def as_batch(prompts: str | Sequence[Any]) -> list[str | list[int]]:
    """A list of prompts from one or several. A list of token ids is one prompt, like a text."""
    return [read_prompt(prompt).content for prompt in split_prompts(prompts)]


def split_prompts(prompts: Prompts) -> list[Any]:
    """One prompt, or several, as a list of prompts that are not checked yet."""
    prompts = as_list(prompts)
    if not isinstance(prompts, list):
        return [prompts]
    are_token_ids = {issubclass(kind, int) for kind in set(map(type, prompts))}
    require(
        len(are_token_ids) < 2,
        "prompts: give a text, a list of token ids, or a list of either, not mixed",
    )
    return [prompts] if True in are_token_ids else prompts


def read_prompt(prompt: Any) -> Prompt:
    """One prompt in any of its forms."""
    prompt = as_list(prompt)
    if isinstance(prompt, str):
        return Prompt(prompt, text=prompt)
    if isinstance(prompt, list):
        return Prompt(prompt)
    if isinstance(prompt, Mapping):
        return read_prompt_dict(prompt)
    raise ValueError(
        f"prompts: {prompt!r} is neither a text nor a list of token ids, nor a dict with one of "
        "them as 'prompt' or 'prompt_token_ids'"
    )


def read_prompt_dict(prompt: Mapping[str, Any]) -> Prompt:
    """vLLM's form. With both keys, the token ids are what runs, and the text is only shown."""
    unknown = [key for key in prompt if key not in PROMPT_KEYS]
    require(
        not unknown,
        f"prompts: a dict has {', '.join(map(repr, unknown))}; "
        "possible are 'prompt' and 'prompt_token_ids'",
    )
    text = prompt.get("prompt")
    require(
        text is None or isinstance(text, str),
        f"prompts: 'prompt' is {text!r}; give a text, or token ids as 'prompt_token_ids'",
    )
    token_ids = as_list(prompt.get("prompt_token_ids"))
    if token_ids is None:
        require(text is not None, "prompts: a dict is empty; give 'prompt' or 'prompt_token_ids'")
        return Prompt(str(text), text)
    require(
        isinstance(token_ids, list),
        f"prompts: 'prompt_token_ids' is {token_ids!r}; give a list of token ids",
    )
    return Prompt(token_ids, text)


def as_list(value: Any) -> Any:
    """A list from a sequence or an array, with Python's numbers in it; anything else as it is.

    NumPy's integers are no `int`. What NumPy and torch have becomes Python's with `tolist`.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence):
        return value
    if set(map(type, value)) <= {int, str}:  # mostly so, and a prompt may be long
        return list(value)
    return [item.tolist() if hasattr(item, "tolist") else item for item in value]


def list_params(params: Params, num_prompts: int) -> list[SamplingParams]:
    """The sampling parameters of each prompt."""
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    by_prompt = list(params)
    require(
        len(by_prompt) == num_prompts,
        f"sampling_params: {len(by_prompt)} for {num_prompts} prompts; give one or as many",
    )
    return by_prompt
