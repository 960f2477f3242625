"""Write a small DeepSeek-V2 checkpoint with random weights, in the format of the Hugging Face hub.

    python examples/make_demo_checkpoint.py DIRECTORY

It has every feature of the big model (q_lora, group-limited routing, shared experts, a dense first
layer, YaRN) and head dims that the GPU kernels support.
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

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
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
    "{{ bos_token }}"
    "{% if tools %}{{ 'Functions: ' + (tools | tojson) + '\n\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + (message['content'] or '') }}"
    # Calls as DeepSeek-V3.1 writes them.
    "{% if message['tool_calls'] %}{{ '<｜tool▁calls▁begin｜>' }}"
    "{% for call in message['tool_calls'] %}{{ '<｜tool▁call▁begin｜>' + call['function']['name'] "
    "+ '<｜tool▁sep｜>' + call['function']['arguments'] + '<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ '<｜tool▁calls▁end｜>' }}{% endif %}{{ eos_token }}"
    "{% elif message['role'] == 'tool' %}{{ 'Function: ' + message['content'] + '\n\n' }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# The tokenizer is trained on this text. Other line breaks would give it other tokens.
TEXT = """
Once upon a time there was a cache that was too large for one machine. Every machine kept a copy of it, and
so the eighth machine held nothing that the first did not hold. Then somebody gave the first token to the
first machine, the second token to the second machine, and so on, around and around. Now every machine asks
its own shard the question, and the answers are put together, weighted by how much each shard had to say.
How many tokens fit? Eight times as many as before. What does it cost? One exchange for every layer. The
user asks, the assistant answers, and the numbers are 0 1 2 3 4 5 6 7 8 9, plus, minus, times and equals.
"""  # noqa: E501


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE with VOCAB_SIZE tokens that puts BOS in front of every text."""
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
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def list_attention_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a layer's attention."""
    hidden = config["hidden_size"]
    num_heads = config["num_attention_heads"]
    q_lora_rank = config["q_lora_rank"]
    kv_lora_rank = config["kv_lora_rank"]
    nope_dim = config["qk_nope_head_dim"]
    rope_dim = config["qk_rope_head_dim"]
    v_dim = config["v_head_dim"]
    yield "self_attn.q_a_proj.weight", (q_lora_rank, hidden)
    yield "self_attn.q_a_layernorm.weight", (q_lora_rank,)
    yield "self_attn.q_b_proj.weight", (num_heads * (nope_dim + rope_dim), q_lora_rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", (kv_lora_rank + rope_dim, hidden)
    yield "self_attn.kv_a_layernorm.weight", (kv_lora_rank,)
    yield "self_attn.kv_b_proj.weight", (num_heads * (nope_dim + v_dim), kv_lora_rank)
    yield "self_attn.o_proj.weight", (hidden, num_heads * v_dim)


def list_mlp_shapes(config: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a layer's MLP or experts."""
    hidden = config["hidden_size"]
    if layer < config["first_k_dense_replace"]:
        widths = {"mlp": config["intermediate_size"]}
    else:
        num_experts = config["n_routed_experts"]
        width = config["moe_intermediate_size"]
        yield "mlp.gate.weight", (num_experts, hidden)
        widths = {f"mlp.experts.{expert}": width for expert in range(num_experts)}
        widths["mlp.shared_experts"] = width * config["n_shared_experts"]

    for name, width in widths.items():
        yield f"{name}.gate_proj.weight", (width, hidden)
        yield f"{name}.up_proj.weight", (width, hidden)
        yield f"{name}.down_proj.weight", (hidden, width)


def list_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every tensor, layer by layer as in the hub's files."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in list_attention_shapes(config):
            yield f"model.layers.{layer}.{name}", shape
        for name, shape in list_mlp_shapes(config, layer):
            yield f"model.layers.{layer}.{name}", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def make_weights(seed: int) -> dict[str, Tensor]:
    """Random bf16 weights.

    Norms are 1. Matrices are normal, with the variance that keeps activations near 1.
    """
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
    """Write shards of at most SHARD_BYTES, model-0000i-of-0000n.safetensors, and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0
    for name, tensor in weights.items():
        if shard_bytes + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.nbytes

    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):06d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))

    total_bytes = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_configs(directory: Path, config: dict[str, Any]) -> None:
    """Write the configurations of the tokenizer, of generation and of the model."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    files = {
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "config.json": config,  # last: make takes it as the sign that everything is written
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where to write; created if missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)

    make_tokenizer().save(str(args.directory / "tokenizer.json"))
    weights = make_weights(args.seed)
    write_shards(args.directory, weights)
    write_configs(args.directory, CONFIG)

    millions = sum(tensor.numel() for tensor in weights.values()) / 1e6
    print(f"{args.directory}: DeepSeek-V2 with {millions:.1f} M random parameters")


if __name__ == "__main__":
    main()
