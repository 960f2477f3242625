"""Checkpoints written by Hugging Face's code, and what Hugging Face's model computes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedModel,
)

from minidcp import RequestOutput

BASE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    norm_topk_prob=False,
    max_position_embeddings=1024,
    initializer_range=0.15,
    bos_token_id=0,
    eos_token_id=1,
)
STYLES = {
    "v2": BASE
    | dict(
        q_lora_rank=48,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=2.0,
        rope_scaling=dict(
            type="yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            beta_fast=32,
            beta_slow=1,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
    ),
    # No q_lora, routing without groups, plain RoPE, and sizes that 4 and 8 do not divide.
    "v2-lite": BASE
    | dict(
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        moe_intermediate_size=28,
        vocab_size=125,
    ),
}
STYLES["v3"] = STYLES["v2"] | dict(
    n_shared_experts=1,
    n_routed_experts=16,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rope_scaling=STYLES["v2"]["rope_scaling"] | dict(mscale=1.0, mscale_all_dim=1.0),
)
del STYLES["v3"]["topk_method"]
# Like GLM-4.7-Flash: wider heads, no groups.
STYLES["glm"] = STYLES["v3"] | dict(
    qk_nope_head_dim=24,
    v_head_dim=32,
    n_group=1,
    topk_group=1,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    mlp_layer_types=["dense", "sparse", "sparse"],
)
CLASSES: dict[str, tuple[type, type[PreTrainedModel]]] = {
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "v2-lite": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "glm": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
}
SEEDS = {
    "v2": 5,
    "v2-lite": 6,
    "v3": 10,
    "glm": 8,
}  # chosen so that the best token is clearly ahead of the second
PROMPT_LENS = (1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 300)
NUM_STEPS = 64


def make_prompt(length: int, vocab: int, salt: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * salt + length)
    return torch.randint(2, vocab, (length,), generator=generator).tolist()


@dataclass(eq=False)
class Oracle:
    """A checkpoint, its model in Hugging Face's code, and that model's greedy completions."""

    path: Path
    model: PreTrainedModel
    prompts: list[list[int]]
    tokens: list[list[int]]  # NUM_STEPS per prompt
    logprobs: list[torch.Tensor]  # [NUM_STEPS, vocab] per prompt

    @torch.no_grad()
    def complete(self, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[0, len(prompt) :].tolist(), torch.stack(out.logits)[:, 0].log_softmax(
            -1
        )


def make_checkpoint(
    directory: Path, style: str, seed: int = 0, **changes: object
) -> PreTrainedModel:
    torch.manual_seed(seed)
    make_config, make_model = CLASSES[style]
    model = make_model(make_config(**(STYLES[style] | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # with ones, a norm without its weight would go unnoticed
                parameter.uniform_(0.7, 1.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # large, with differences that decide
                buffer.uniform_(7.0, 7.5)
    model.save_pretrained(directory, max_shard_size="200KB" if style == "v2" else "5GB")
    return model


ORACLES: dict[str, Oracle] = {}


def build_oracle(style: str, make_directory: Callable[[str], Path]) -> Oracle:
    if style not in ORACLES:
        path = make_directory(style)
        built = Oracle(path, make_checkpoint(path, style, SEEDS[style]), [], [], [])
        built.prompts = [make_prompt(n, STYLES[style]["vocab_size"]) for n in PROMPT_LENS]
        for prompt in built.prompts:
            tokens, logprobs = built.complete(prompt, NUM_STEPS)
            built.tokens.append(tokens)
            built.logprobs.append(logprobs)
        # Greedy tokens can be compared only if the two best are never nearly equal.
        margins = torch.stack(built.logprobs).topk(2, -1).values.diff(dim=-1).abs()
        assert margins.min() > 1e-4, "choose another seed"
        ORACLES[style] = built
    return ORACLES[style]


@torch.no_grad()
def measure_errors(
    model: torch.nn.Module, output: RequestOutput, steps: int | None = None
) -> torch.Tensor:
    """Errors of the two best log-probabilities of each step that the engine reported, [steps, 2].

    They are compared with those of transformers in fp32 on the same tokens.
    """
    prompt, completion = output.prompt_token_ids, output.outputs[0]
    logits = model(torch.tensor([prompt + completion.token_ids[:-1]])).logits[0, len(prompt) - 1 :]
    expected = logits.log_softmax(-1)
    top = [entry.top for entry in completion.logprobs[:steps]]
    ids, values = (torch.tensor([[pair[i] for pair in step] for step in top]) for i in (0, 1))
    return (values - expected[: len(top)].gather(1, ids)).abs()
