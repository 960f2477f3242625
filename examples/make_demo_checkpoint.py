"""Write a small DeepSeek-V2 checkpoint with random weights, in the exact format of the Hugging Face hub.

Every feature of the big model is there (q_lora, group-limited routing, shared experts, a dense first
layer, YaRN), with the head dims that GPU kernels want. Usage: make_demo_checkpoint.py DIRECTORY
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
VOCAB_SIZE = 512
SHARD_BYTES = 16 << 20

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 192,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 768,
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 4.0,
    "scoring_func": "softmax",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 2048,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

TEXT = """
Once upon a time there was a cache that was too large for one machine. Every machine kept a copy of it, and
so the eighth machine held nothing that the first did not hold. Then somebody gave the first token to the
first machine, the second token to the second machine, and so on, around and around. Now every machine asks
its own shard the question, and the answers are put together, weighted by how much each shard had to say.
How many tokens fit? Eight times as many as before. What does it cost? One exchange for every layer. The
user asks, the assistant answers, and the numbers are 0 1 2 3 4 5 6 7 8 9, plus, minus, times and equals.
"""


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens that puts BOS in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def list_shapes(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, layer by layer as the hub's files have them."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attn = f"{layer}.self_attn"
        yield f"{attn}.q_a_proj.weight", (c["q_lora_rank"], hidden)
        yield f"{attn}.q_a_layernorm.weight", (c["q_lora_rank"],)
        q_rows = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        yield f"{attn}.q_b_proj.weight", (q_rows, c["q_lora_rank"])
        yield f"{attn}.kv_a_proj_with_mqa.weight", (c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden)
        yield f"{attn}.kv_a_layernorm.weight", (c["kv_lora_rank"],)
        kv_rows = heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
        yield f"{attn}.kv_b_proj.weight", (kv_rows, c["kv_lora_rank"])
        yield f"{attn}.o_proj.weight", (hidden, heads * c["v_head_dim"])
        if i < c["first_k_dense_replace"]:
            mlps = {"mlp": c["intermediate_size"]}
        else:
            yield f"{layer}.mlp.gate.weight", (c["n_routed_experts"], hidden)
            width = c["moe_intermediate_size"]
            mlps = {f"mlp.experts.{e}": width for e in range(c["n_routed_experts"])}
            mlps["mlp.shared_experts"] = width * c["n_shared_experts"]
        for name, width in mlps.items():
            yield f"{layer}.{name}.gate_proj.weight", (width, hidden)
            yield f"{layer}.{name}.up_proj.weight", (width, hidden)
            yield f"{layer}.{name}.down_proj.weight", (hidden, width)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)


def make_weights(seed: int) -> dict[str, Tensor]:
    """bf16 weights: norms are 1, matrices normal with the variance that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in list_shapes(CONFIG):
        if len(shape) == 1:
            tensor = torch.ones(shape)
        else:
            std = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
            tensor = torch.randn(shape, generator=generator) * std
        weights[name] = tensor.to(torch.bfloat16)
    return weights


def write_shards(directory: Path, weights: dict[str, Tensor]) -> None:
    """model-0000i-of-0000n.safetensors and their index, at most SHARD_BYTES each."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):06d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)

    make_tokenizer().save(str(args.directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    weights = make_weights(args.seed)
    write_shards(args.directory, weights)
    files = {
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "config.json": CONFIG,  # last: make takes it for the sign that all is written
    }
    for name, content in files.items():
        (args.directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    millions = sum(t.numel() for t in weights.values()) / 1e6
    print(f"{args.directory}: DeepSeek-V2 with {millions:.1f} M random parameters")


if __name__ == "__main__":
    main()
