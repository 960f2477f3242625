"""Fields of OpenAI's, vLLM's and SGLang's requests that change the answer there and would have no
effect here. `protocol.py` refuses them, unless their value asks for what is done anyway. All other
unknown fields are ignored; tests/test_fields.py goes through all that there are."""

from typing import Any

UNSUPPORTED_FIELDS = {
    "suffix",
    # Completions refuse these two; chats obey them.
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "guided_decoding_backend",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "include_stop_str_in_output",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "allowed_token_ids",
    "bad_words",
    "use_beam_search",
    # OpenAI's
    "audio",
    "modalities",
    "moderation",
    "reasoning_effort",
    "store",
    "verbosity",
    "web_search_options",
    # vLLM's
    "documents",
    "ec_transfer_params",
    "include_reasoning",
    "kv_transfer_params",
    "logprob_token_ids",
    "priority",
    "prompt_embeds",
    "repetition_detection",
    "return_prompt_text",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "spaces_between_special_tokens",
    "thinking_token_budget",
    "vllm_xargs",
    "watermarking",
    # SGLang's
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "custom_labels",
    "custom_logit_processor",
    "custom_params",
    "extra_key",
    "input_ids",
    "lora_path",
    "no_stop_trim",
    "reasoning",
    "return_cached_tokens_details",
    "return_hidden_states",
    "return_meta_info",
    "return_prompt_token_ids",
    "return_routed_experts",
    "session_params",
    "stop_regex",
    "task",
    # These are fields of completions, which obey them. Chats do not.
    "best_of",
    "echo",
}
NEUTRAL_VALUES: tuple[Any, ...] = ("", False, [], {}, "none", "auto", {"type": "text"}, None)
# Fields of which another value asks for what is done anyway.
NEUTRAL_BY_FIELD: dict[str, Any] = {
    "best_of": 1,
    "include_reasoning": True,
    "modalities": ["text"],
    "spaces_between_special_tokens": True,
    "thinking_token_budget": -1,
    "verbosity": "medium",
}


def is_refused(name: str, value: Any) -> bool:
    """Whether a field asks for something that is not done here."""
    if name in NEUTRAL_BY_FIELD:
        return value not in (None, NEUTRAL_BY_FIELD[name])
    return name in UNSUPPORTED_FIELDS and value not in NEUTRAL_VALUES
