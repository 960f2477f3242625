"""Every field of the requests that OpenAI, vLLM and SGLang take is obeyed, changes nothing, or is
refused by its name."""

from __future__ import annotations

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError

from minidcp_server.protocol import ChatRequest, CompletionRequest
from minidcp_server.unsupported import NEUTRAL_BY_FIELD, NEUTRAL_VALUES, UNSUPPORTED_FIELDS

OPENAI_CHAT = sorted(chat_create_params.CompletionCreateParamsBase.__annotations__)
OPENAI_COMPLETION = sorted(completion_create_params.CompletionCreateParamsBase.__annotations__)

# vLLM's vllm/entrypoints/openai/{chat_completion,completion}/protocol.py, what OpenAI has not.
VLLM_FIELDS = """
    add_special_tokens allowed_token_ids bad_words cache_salt chat_template
    chat_template_kwargs continue_final_message documents echo ec_transfer_params ignore_eos
    include_reasoning include_stop_str_in_output kv_transfer_params length_penalty
    logprob_token_ids media_io_kwargs min_p min_tokens mm_processor_kwargs priority prompt_embeds
    prompt_logprobs repetition_detection repetition_penalty request_id response_format
    return_mm_kwargs return_prompt_text return_token_ids return_token_offsets
    return_tokens_as_token_ids routed_experts_prompt_start session_id skip_special_tokens
    spaces_between_special_tokens stop_token_ids stream_interval structured_outputs
    thinking_token_budget top_k truncate_prompt_tokens truncation_side use_beam_search vllm_xargs
    watermarking guided_json guided_regex guided_choice guided_grammar guided_decoding_backend
"""
# SGLang's python/sglang/srt/entrypoints/openai/protocol.py, what the others have not.
SGLANG_FIELDS = """
    best_of bootstrap_host bootstrap_port bootstrap_room custom_labels custom_logit_processor
    custom_params data_parallel_rank disagg_prefill_dp_rank ebnf extra_key images_config input_ids
    json_schema lora_path max_dynamic_patch min_dynamic_patch ngram_corpus_id no_stop_trim reasoning
    regex return_cached_tokens_details return_hidden_states return_meta_info
    return_prompt_token_ids return_routed_experts rid routed_dp_rank routed_experts_start_len
    separate_reasoning session_params stop_regex stream_reasoning task use_audio_in_video
"""

VLLM = VLLM_FIELDS.split()
SGLANG = SGLANG_FIELDS.split()

IGNORED = {
    "metadata": "a note for whoever stores answers",
    "prediction": "makes answers faster, not different",
    "prompt_cache_key": "a hint about the cache",
    "prompt_cache_options": "a hint about the cache",
    "prompt_cache_retention": "a hint about the cache",
    "safety_identifier": "says who asks",
    "service_tier": "a price",
    "length_penalty": "only with beams",
    "media_io_kwargs": "only with images",
    "mm_processor_kwargs": "only with images",
    "request_id": "a name for logs",
    "return_mm_kwargs": "ignored by vLLM too",
    "return_token_offsets": "ignored by vLLM too",
    "routed_experts_prompt_start": "only with return_routed_experts",
    "session_id": "for routers",
    "stream_interval": "how many tokens an event has: here one",
    "truncation_side": "only with truncate_prompt_tokens",
    "data_parallel_rank": "where it runs",
    "disagg_prefill_dp_rank": "where it runs",
    "images_config": "only with images",
    "max_dynamic_patch": "only with images",
    "min_dynamic_patch": "only with images",
    "ngram_corpus_id": "makes answers faster, not different",
    "rid": "a name for logs",
    "routed_dp_rank": "where it runs",
    "routed_experts_start_len": "only with return_routed_experts",
    "separate_reasoning": "only with a parser for reasoning",
    "stream_reasoning": "only with a parser for reasoning",
    "use_audio_in_video": "only with videos",
}
# Values that clients send; for the other fields any value will do.
VALUES = {
    "audio": {"voice": "alloy", "format": "mp3"},
    "best_of": 2,
    "include_reasoning": False,
    "modalities": ["text", "audio"],
    "spaces_between_special_tokens": False,
    "web_search_options": {"search_context_size": "low"},
}
BASES = {CompletionRequest: {"prompt": "a"}, ChatRequest: {"messages": [{"role": "user"}]}}
CASES = [(CompletionRequest, name) for name in {*OPENAI_COMPLETION, *VLLM, *SGLANG}]
CASES += [(ChatRequest, name) for name in {*OPENAI_CHAT, *VLLM, *SGLANG, "add_generation_prompt"}]


@pytest.mark.parametrize(
    ("model", "name"), sorted(CASES, key=str), ids=lambda value: getattr(value, "__name__", value)
)
def test_a_field_is_obeyed_ignored_or_refused(model: type, name: str) -> None:
    base = BASES[model]
    if name in model.model_fields:
        assert name not in IGNORED
        return
    body = base | {name: VALUES.get(name, {"some": "value"})}
    if name in IGNORED:
        assert name not in UNSUPPORTED_FIELDS
        params = model(**body).make_sampling_params({})
        assert params == model(**base).make_sampling_params({})
        return
    with pytest.raises(ValidationError) as refused:
        model(**body)
    (error,) = refused.value.errors()
    assert str(error["ctx"]["error"]).startswith(f"{name} ")
    for neutral in (None, NEUTRAL_BY_FIELD.get(name)):
        model(**base, **{name: neutral})


def test_the_table_has_no_strangers() -> None:
    known = {*OPENAI_CHAT, *OPENAI_COMPLETION, *VLLM, *SGLANG}
    assert known >= UNSUPPORTED_FIELDS
    assert known >= set(IGNORED)
    assert set(NEUTRAL_BY_FIELD) <= UNSUPPORTED_FIELDS
    assert None in NEUTRAL_VALUES
