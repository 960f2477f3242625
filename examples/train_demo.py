"""Train the demo model from scratch on problems made here, on one GPU, and write a hub checkpoint.

A DeepSeek-V2 of 16 million parameters with every feature of the big one. `demo_problems.py` is what it
learns, `demo_forward.py` how; `demo-model/README.md` has the commands that made the checkpoint there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from demo_forward import Muon, TrainingForward
from demo_rows import LENGTHS, RowBatch, Tokenize, make_batch
from demo_tokenizer import BOS, CHAT_TEMPLATE, EOS, make_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

VOCAB_SIZE = 1536
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
    "routed_scaling_factor": 2.0,
    "scoring_func": "softmax",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "max_position_embeddings": 10240,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 2560,
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
QUESTION_WEIGHT, BALANCE_WEIGHT = 0.05, 0.01
WARM_UP = 90  # steps in which the learning rate rises


def make_model(seed: int) -> DeepseekV2ForCausalLM:
    """Normal matrices with a variance by fan-in; those that end a block smaller, router and head tiny."""
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**CONFIG))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                std = 0.5 * p.shape[-1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    std *= 0.3
                if "lm_head" in name or "mlp.gate.weight" in name:
                    std *= 0.1
                p.normal_(0, 1.0 if "embed" in name else std)
    return model


def choose_length(rng: Random, progress: float, longest: int) -> int:
    """Rows of retrieval grow: the way to look something up is found sooner in short ones."""
    steps = ((0.10, (4, 2, 0, 0, 0, 0)), (0.20, (2, 3, 4, 0, 0, 0)), (0.35, (1, 2, 3, 4, 0, 0)),
             (0.50, (1, 1, 2, 3, 4, 0)), (1.01, (1, 1, 2, 3, 4, 5)))  # fmt: skip
    shares = next(shares for end, shares in steps if progress < end)
    allowed = [length for length in LENGTHS if length <= longest]
    return rng.choices(allowed, shares[: len(allowed)])[0]


class Source:
    """Batches for step 0, 1, …, made in order by other processes; the same for the same seed."""

    def __init__(self, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        self.tokenize, self.args = Tokenize(tokenizer), args

    def make_step(self, step: int) -> list[RowBatch]:
        rng = Random(self.args.seed * 1_000_003 + step)
        length = choose_length(rng, self.grown(step), self.args.longest)
        other = choose_length(rng, self.grown(step), self.args.longest)
        first = ("words", LENGTHS[2]) if rng.random() < self.args.words else ("retrieval", other)
        return [
            make_batch(rng, self.tokenize, kind, self.args.batch_tokens // length, length)
            for kind, length in (first, ("retrieval", length))
        ]

    def grown(self, step: int) -> float:
        """How far the rows have grown: from the start, if the model can already look things up."""
        return 1.0 if self.args.start else step / self.args.steps

    def produce(self, first: int, stride: int, queue: Queue[list[RowBatch]]) -> None:
        for step in range(first, self.args.steps, stride):
            queue.put(self.make_step(step))

    def __iter__(self) -> Iterator[list[RowBatch]]:
        context, workers = multiprocessing.get_context("fork"), self.args.workers
        queues = [context.Queue(4) for _ in range(workers)]
        for i, queue in enumerate(queues):
            context.Process(target=self.produce, args=(i, workers, queue), daemon=True).start()
        for step in range(self.args.steps):
            yield queues[step % workers].get(timeout=300)


class Trainer:
    """Model, optimizers and what they need at a step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        on_gpu = self.device.type == "cuda"
        if args.start:
            model: Any = DeepseekV2ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        else:
            model = make_model(args.seed)
        self.model: DeepseekV2ForCausalLM = model.to(self.device).train()
        self.forward = TrainingForward(
            self.model,
            torch.bfloat16 if on_gpu else torch.float32,
            (lambda f: torch.compile(f, dynamic=False)) if on_gpu else (lambda f: f),
        )
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, p in self.model.named_parameters():
            plain = p.dim() == 1 or "embed" in name or "lm_head" in name or "mlp.gate.weight" in name
            (others if plain else matrices).append(p)
        self.muon = Muon(matrices, lr=args.muon_lr)
        self.adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu)
        self.lr = args.lr

    def load(self, batch: RowBatch) -> tuple[Tensor, Tensor]:
        tokens, labels = (torch.from_numpy(a.astype(np.int64)) for a in batch)
        return tokens.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def step(self, batches: list[RowBatch], scale: float) -> list[Tensor]:
        """One update; the loss of the answers in each batch, and the balance loss."""
        report = []
        for batch in batches:
            tokens, labels = self.load(batch)
            losses, _, balance = self.forward(tokens)
            weights = (labels[:, 1:] > 1) + QUESTION_WEIGHT * (labels[:, 1:] == 1)
            loss = (losses * weights).sum() / weights.sum()
            (loss + BALANCE_WEIGHT * balance).backward()
            answers = labels[:, 1:] > 1
            report += [(losses.detach() * answers).sum() / answers.sum(), balance.detach()]
        for group in self.adam.param_groups:
            group["lr"] = self.lr * scale
        self.adam.step()
        self.muon.step(scale)
        self.model.zero_grad(set_to_none=True)
        return report

    def measure(self, batch: RowBatch) -> float:
        """The share of answers each of whose tokens is the most likely one after the right ones before it."""
        tokens, labels = self.load(batch)
        _, right, _ = self.forward(tokens)  # without no_grad, for which all would be compiled again
        labels = labels[:, 1:]
        number = labels + torch.arange(len(labels), device=labels.device)[:, None] * 1000
        answers = torch.unique(number[labels > 1])
        wrong = torch.unique(number[(labels > 1) & ~right])
        return 1 - len(wrong) / len(answers)


def save(model: DeepseekV2ForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """As on the hub: bf16 shards and their index, config, tokenizer, chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to("cpu", torch.bfloat16) for name, t in model.state_dict().items()}
    copy: Any = DeepseekV2ForCausalLM(DeepseekV2Config(**CONFIG))
    copy.to(torch.bfloat16).load_state_dict(state)
    copy.save_pretrained(directory, max_shard_size="15MB")
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    files = {
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "config.json": CONFIG,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def scale_rate(step: int, progress: float, decay: float) -> float:
    """Warm-up, constant, then down to zero by a straight line."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (1 - progress) / decay))


def train(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json")) if args.start else make_tokenizer(args.seed)
    source = Source(tokenizer, args)
    held_out = {
        f"{kind}-{length}": make_batch(
            Random(99), source.tokenize, kind, args.batch_tokens // length, length, held_out=True
        )
        for kind, length in (
            ("words", LENGTHS[2]),
            *(("retrieval", n) for n in LENGTHS[1::2] if n <= args.longest),
        )
    }
    batches = iter(source)
    first = next(batches)  # the workers start before this process has touched the GPU
    trainer = Trainer(args)
    size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {tokenizer.get_vocab_size()} tokens; "
          f"{time.perf_counter() - start:.0f} s to start", flush=True)  # fmt: skip
    best, result, done, lap = -1.0, {}, 0, time.perf_counter()
    for step in range(args.steps):
        elapsed = (time.perf_counter() - start) / 60
        progress = max((step + 1) / args.steps, elapsed / args.minutes)
        report = trainer.step(first if step == 0 else next(batches), scale_rate(step, progress, args.decay))
        last = step + 1 == args.steps or progress >= 1
        if last or (step + 1) % args.report == 0 or step < 3:
            losses = " ".join(f"{float(x):.4f}" for x in report)
            now = time.perf_counter()
            rate = (step + 1 - done) * 2 * args.batch_tokens / (now - lap) / 1e3
            print(
                f"step {step + 1} {elapsed:.2f} min, {rate:.0f} k tokens/s, loss and balance {losses}",
                flush=True,
            )
            done, lap = step + 1, now
        if last or (step + 1) % args.measure == 0:
            accuracy = {name: trainer.measure(batch) for name, batch in held_out.items()}
            print("  held out:", " ".join(f"{k} {v:.4f}" for k, v in accuracy.items()), flush=True)
            if (progress > 0.5 and min(accuracy.values()) > best) or (last and best < 0):
                best = min(accuracy.values())
                result = {"step": step + 1, "minutes": round(elapsed, 2), **accuracy}
                save(trainer.model, tokenizer, args.directory)
            done, lap = step + 1, time.perf_counter()
        if last:
            break
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write the checkpoint")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint, with rows of every length")
    parser.add_argument("--steps", type=int, default=4500, help="updates, of two batches each")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop, with the learning rate down, by then")
    parser.add_argument("--batch-tokens", type=int, default=33792, help="of a batch; a multiple of the longest row")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="the longest row to train on")
    parser.add_argument("--lr", type=float, default=3e-3, help="of vectors, embedding, head and router")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="of all other matrices")
    parser.add_argument("--decay", type=float, default=0.55, help="share of the training in which the rate falls")
    parser.add_argument("--words", type=float, default=1.0, help="share of steps with word problems in them")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that make batches")
    parser.add_argument("--report", type=int, default=100, help="steps from one line to the next")
    parser.add_argument("--measure", type=int, default=250, help="steps from one accuracy to the next")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(train(parser.parse_args())))


if __name__ == "__main__":
    main()
