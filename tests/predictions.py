"""A DeepSeek-V3 checkpoint with a layer that predicts a second token (MTP), and what that layer
predicts by transformers' code: it is a DeepseekV3Model of one layer, whose norm is the layer's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import STYLES, make_checkpoint, make_prompt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3Model
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

NUM_LAYERS = STYLES["v3"]["num_hidden_layers"]
PROMPT_LENS = (1, 2, 7, 8, 16, 33, 65, 130)
NUM_TOKENS = 24


class MTPModule(nn.Module):
    """Arguments are those of the DeepSeek-V3 report (arXiv:2412.19437, §2.2), for one sequence."""

    def __init__(self, model: DeepseekV3ForCausalLM, seed: int, **changes: object) -> None:
        super().__init__()
        torch.manual_seed(seed)
        hidden = model.config.hidden_size
        one_layer = dict(num_hidden_layers=1, first_k_dense_replace=0)
        config = DeepseekV3Config(**(STYLES["v3"] | changes | one_layer))
        self.model = model
        self.block = DeepseekV3Model(config)
        self.enorm = DeepseekV3RMSNorm(hidden)
        self.hnorm = DeepseekV3RMSNorm(hidden)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name and not name.startswith("model."):
                    parameter.uniform_(0.7, 1.3)
            self.block.layers[0].mlp.gate.e_score_correction_bias.uniform_(7.0, 7.5)
        self.eval()

    def make_input(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        embedded = self.model.model.embed_tokens(tokens)
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))

    def run(self, inputs: Tensor) -> Tensor:
        """[T, hidden] -> hidden states behind the norm [T, hidden]."""
        return self.block(inputs_embeds=inputs[None]).last_hidden_state[0]

    @torch.no_grad()
    def predict(self, tokens: list[int], count: int) -> tuple[list[int], Tensor]:
        """`count` tokens behind these, and the hidden states that they come from."""
        known = torch.tensor(tokens)
        hidden = self.model.model(known[None, :-1]).last_hidden_state[0]
        inputs = self.make_input(known[1:], hidden)
        drafts: list[int] = []
        states = []
        for _ in range(count):
            state = self.run(inputs)[-1:]
            states.append(state)
            draft = self.model.lm_head(state).argmax(-1)
            drafts.append(int(draft))
            inputs = torch.cat([inputs, self.make_input(draft, state)])
        return drafts, torch.cat(states)

    def train_on(self, texts: list[list[int]], steps: int) -> None:
        """Learn what the model says, so that some drafts are right."""
        mine = [p for name, p in self.named_parameters() if not name.startswith("model.")]
        optimizer = torch.optim.Adam(mine, lr=0.01)
        batch = torch.tensor(texts)
        with torch.no_grad():
            hidden = self.model.model(batch[:, :-2]).last_hidden_state
        for _ in range(steps):
            inputs = self.make_input(batch[:, 1:-1], hidden)
            logits = self.model.lm_head(self.block(inputs_embeds=inputs).last_hidden_state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 2:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def list_tensors(self) -> dict[str, Tensor]:
        """By the checkpoint's names."""
        tensors = {
            "embed_tokens.weight": self.model.model.embed_tokens.weight,
            "shared_head.head.weight": self.model.lm_head.weight,
            "shared_head.norm.weight": self.block.norm.weight,
            "enorm.weight": self.enorm.weight,
            "hnorm.weight": self.hnorm.weight,
            "eh_proj.weight": self.eh_proj.weight,
        }
        tensors |= self.block.layers[0].state_dict()
        named = {}
        for name, tensor in tensors.items():
            named[f"model.layers.{NUM_LAYERS}.{name}"] = tensor.detach().clone()
        return split_experts(named)


def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints have a matrix for each expert, transformers' module a stack of all."""
    split = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            split[name] = tensor
            continue
        prefix, kind = name.rsplit(".", 1)
        for index, matrix in enumerate(tensor):
            if kind == "down_proj":
                split[f"{prefix}.{index}.down_proj.weight"] = matrix.clone()
            else:
                gate, up = matrix.chunk(2)
                split[f"{prefix}.{index}.gate_proj.weight"] = gate.clone()
                split[f"{prefix}.{index}.up_proj.weight"] = up.clone()
    return split


@dataclass(eq=False)
class PredictionOracle:
    """A checkpoint, its MTP layer, and what the model says greedily."""

    path: Path
    mtp: MTPModule
    prompts: list[list[int]]
    answers: list[list[int]]  # NUM_TOKENS for each prompt


def make_prediction_checkpoint(
    path: Path, seed: int = 10, steps: int = 60, **changes: object
) -> PredictionOracle:
    model = make_checkpoint(path, "v3", seed, **changes)
    mtp = MTPModule(model, seed, **changes)
    prompts = [make_prompt(length, model.config.vocab_size) for length in PROMPT_LENS]
    answers = []
    for prompt in prompts:
        sequences = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(sequences[0, len(prompt) :].tolist())
    mtp.train_on([(p + a)[-NUM_TOKENS - 1 :] for p, a in zip(prompts, answers, strict=True)], steps)

    file = path / "model.safetensors"
    save_file(load_file(file) | mtp.list_tensors(), file, {"format": "pt"})
    config_file = path / "config.json"
    config = json.loads(config_file.read_text()) | dict(num_nextn_predict_layers=1)
    config_file.write_text(json.dumps(config))
    return PredictionOracle(path, mtp, prompts, answers)
