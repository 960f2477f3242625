"""Train the demo model from scratch on generated problems, on one GPU, and write a hub checkpoint.

The model is a DeepSeek-V2 of 16 million parameters with every feature of the big one. Read
`demo_problems.py` for what it learns and `demo_forward.py` for the forward pass and the optimizer.
`demo-model/README.md` has the commands that made the checkpoint there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from itertools import chain
from multiprocessing.queues import Queue
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from demo_forward import Muon, TrainingForward
from demo_rows import ANSWERS, ASKED, LENGTHS, RowBatch, Tokenize, make_batch
from demo_tokenizer import make_tokenizer
from make_demo_checkpoint import write_configs
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
QUESTION_WEIGHT = 0.05  # of a question's tokens in the loss; an answer's tokens have weight 1
BALANCE_WEIGHT = 0.01
WARM_UP = 90  # steps in which the learning rate rises
WORDS_LENGTH = LENGTHS[2]  # of rows with word problems, in tokens

# How often each of LENGTHS is drawn for rows of retrieval, until this share of the training is
# done.
LENGTH_SHARES = (
    (0.10, (4, 2, 0, 0, 0, 0)),
    (0.20, (2, 3, 4, 0, 0, 0)),
    (0.35, (1, 2, 3, 4, 0, 0)),
    (0.50, (1, 1, 2, 3, 4, 0)),
    (1.01, (1, 1, 2, 3, 4, 5)),
)


def make_model(seed: int) -> DeepseekV2ForCausalLM:
    """A model with random weights: normal matrices with a variance that depends on the fan-in.

    The matrices at the end of a block are smaller. The router and the head are tiny.
    """
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                continue
            std = 0.5 * parameter.shape[-1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                std *= 0.3
            if "lm_head" in name or "mlp.gate.weight" in name:
                std *= 0.1
            if "embed" in name:
                std = 1.0
            parameter.normal_(0, std)
    return model


def choose_length(rng: Random, progress: float, longest: int) -> int:
    """Draw a length for rows of retrieval.

    The rows grow during the training: the model learns to look something up sooner in short rows.
    """
    shares = next(shares for end, shares in LENGTH_SHARES if progress < end)
    allowed = [length for length in LENGTHS if length <= longest]
    return rng.choices(allowed, shares[: len(allowed)])[0]


class Source:
    """The batches for step 0, 1, 2 and so on, made by other processes.

    They come in order and depend only on the seed.
    """

    def __init__(self, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        self.tokenize = Tokenize(tokenizer)
        self.args = args

    def make_step(self, step: int) -> list[RowBatch]:
        """Make the two batches of a step: word problems or retrieval, and retrieval."""
        rng = Random(self.args.seed * 1_000_003 + step)
        growth = self.measure_growth(step)
        length = choose_length(rng, growth, self.args.longest)
        other_length = choose_length(rng, growth, self.args.longest)
        if rng.random() < self.args.words:
            first = self.make_rows(rng, "words", WORDS_LENGTH)
        else:
            first = self.make_rows(rng, "retrieval", other_length)
        return [first, self.make_rows(rng, "retrieval", length)]

    def make_rows(self, rng: Random, kind: str, length: int, held_out: bool = False) -> RowBatch:
        num_rows = self.args.batch_tokens // length
        return make_batch(rng, self.tokenize, kind, num_rows, length, held_out)

    def make_held_out(self) -> dict[str, RowBatch]:
        """Batches to measure accuracy on: word problems, and retrieval at several lengths."""
        batches = {}
        words = self.make_rows(Random(99), "words", WORDS_LENGTH, held_out=True)
        batches[f"words-{WORDS_LENGTH}"] = words
        for length in LENGTHS[1::2]:
            if length <= self.args.longest:
                retrieval = self.make_rows(Random(99), "retrieval", length, held_out=True)
                batches[f"retrieval-{length}"] = retrieval
        return batches

    def measure_growth(self, step: int) -> float:
        """How far the rows have grown, from 0 to 1.

        It is 1 from the start if the model comes from a checkpoint: it can already look things up.
        """
        if self.args.start:
            return 1.0
        return float(step / self.args.steps)

    def produce(self, worker: int, queue: Queue[list[RowBatch]]) -> None:
        """Make the batches of one worker process: every `workers`-th step."""
        for step in range(worker, self.args.steps, self.args.workers):
            queue.put(self.make_step(step))

    def __iter__(self) -> Iterator[list[RowBatch]]:
        context = multiprocessing.get_context("fork")
        num_workers = self.args.workers
        queues = [context.Queue(4) for _ in range(num_workers)]
        for worker, queue in enumerate(queues):
            context.Process(target=self.produce, args=(worker, queue), daemon=True).start()
        for step in range(self.args.steps):
            yield queues[step % num_workers].get(timeout=300)


class Trainer:
    """The model and its optimizers."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        on_gpu = self.device.type == "cuda"
        if args.start:
            model: Any = DeepseekV2ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        else:
            model = make_model(args.seed)
        self.model: DeepseekV2ForCausalLM = model.to(self.device).train()

        if on_gpu:
            self.forward = TrainingForward(
                self.model, torch.bfloat16, lambda f: torch.compile(f, dynamic=False)
            )
        else:
            self.forward = TrainingForward(self.model, torch.float32)

        matrices: list[Tensor] = []
        others: list[Tensor] = []  # vectors, embedding, head and router
        for name, parameter in self.model.named_parameters():
            is_special = "embed" in name or "lm_head" in name or "mlp.gate.weight" in name
            if parameter.dim() == 1 or is_special:
                others.append(parameter)
            else:
                matrices.append(parameter)
        self.lr = args.lr
        self.muon = Muon(matrices, lr=args.muon_lr)
        self.adam = torch.optim.AdamW(
            others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu
        )

    def load(self, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """Copy tokens and labels to the device."""
        tokens = torch.from_numpy(batch.tokens.astype(np.int64))
        labels = torch.from_numpy(batch.labels.astype(np.int64))
        return tokens.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def step(self, batches: list[RowBatch], scale: float) -> list[Tensor]:
        """Update the parameters once, with the learning rates times `scale`.

        Returns:
            Two numbers for each batch: the loss of the answers and the balance loss.
        """
        report = []
        for batch in batches:
            tokens, labels = self.load(batch)
            losses, _, balance = self.forward(tokens)
            answers = labels[:, 1:] >= ANSWERS
            weights = answers + QUESTION_WEIGHT * (labels[:, 1:] == ASKED)
            loss = (losses * weights).sum() / weights.sum()
            (loss + BALANCE_WEIGHT * balance).backward()
            report.append((losses.detach() * answers).sum() / answers.sum())
            report.append(balance.detach())

        for group in self.adam.param_groups:
            group["lr"] = self.lr * scale
        self.adam.step()
        self.muon.step(scale)
        self.model.zero_grad(set_to_none=True)
        return report

    def measure(self, batch: RowBatch) -> float:
        """The share of right answers.

        An answer is right if each of its tokens is the likeliest one after the right tokens before
        it.
        """
        tokens, labels = self.load(batch)
        # Not under no_grad: the forward pass would be compiled again for it.
        _, right, _ = self.forward(tokens)
        labels = labels[:, 1:]
        rows = torch.arange(len(labels), device=labels.device)[:, None]
        answer_ids = labels + rows * 1000  # unique over all rows
        answers = torch.unique(answer_ids[labels >= ANSWERS])
        wrong = torch.unique(answer_ids[(labels >= ANSWERS) & ~right])
        return 1 - len(wrong) / len(answers)


def save(model: DeepseekV2ForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write what the hub has: bf16 shards and their index, config, tokenizer, chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to("cpu", torch.bfloat16) for name, t in model.state_dict().items()}
    copy: Any = DeepseekV2ForCausalLM(DeepseekV2Config(**CONFIG))
    copy.to(torch.bfloat16).load_state_dict(state)
    copy.save_pretrained(directory, max_shard_size="15MB")

    tokenizer.save(str(directory / "tokenizer.json"))
    write_configs(directory, CONFIG)


def scale_rate(step: int, progress: float, decay: float) -> float:
    """Scale the learning rate: it rises linearly, stays constant, then falls linearly to zero."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (1 - progress) / decay))


class Progress:
    """The time since the start, and lines about losses and speed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.start = time.perf_counter()
        self.restart_lap(0)

    @property
    def minutes(self) -> float:
        return (time.perf_counter() - self.start) / 60

    def restart_lap(self, num_steps: int) -> None:
        """Measure speed from now on, when `num_steps` steps are done."""
        self.lap_start = time.perf_counter()
        self.lap_first_step = num_steps

    def print_losses(self, num_steps: int, minutes: float, report: list[Tensor]) -> None:
        losses = " ".join(f"{float(x):.4f}" for x in report)  # waits for the GPU
        seconds = time.perf_counter() - self.lap_start
        num_tokens = (num_steps - self.lap_first_step) * 2 * self.args.batch_tokens
        print(
            f"step {num_steps} {minutes:.2f} min, {num_tokens / seconds / 1e3:.0f} k tokens/s, "
            f"loss and balance {losses}",
            flush=True,
        )
        self.restart_lap(num_steps)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and save the checkpoint whose lowest accuracy is best in the second half.

    Returns:
        The step and the accuracies of the saved checkpoint.
    """
    progress = Progress(args)
    if args.start:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
    else:
        tokenizer = make_tokenizer(args.seed)
    source = Source(tokenizer, args)
    held_out = source.make_held_out()

    # The first batches start the workers, which must happen before this process touches the GPU.
    batches = iter(source)
    first_batches = next(batches)
    trainer = Trainer(args)
    millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    print(
        f"{millions:.1f} M parameters, {tokenizer.get_vocab_size()} tokens; "
        f"{progress.minutes * 60:.0f} s to start",
        flush=True,
    )

    best = -1.0
    result: dict[str, Any] = {}
    progress.restart_lap(0)
    for num_steps, step_batches in enumerate(chain([first_batches], batches), start=1):
        minutes = progress.minutes
        done = max(num_steps / args.steps, minutes / args.minutes)  # from 0 to 1
        report = trainer.step(step_batches, scale_rate(num_steps - 1, done, args.decay))

        is_last = num_steps == args.steps or done >= 1
        if is_last or num_steps % args.report == 0 or num_steps <= 3:
            progress.print_losses(num_steps, minutes, report)

        if is_last or num_steps % args.measure == 0:
            accuracy = {name: trainer.measure(batch) for name, batch in held_out.items()}
            print("  held out:", " ".join(f"{k} {v:.4f}" for k, v in accuracy.items()), flush=True)
            worst = min(accuracy.values())
            is_best = done > 0.5 and worst > best
            nothing_saved = best < 0
            if is_best or (is_last and nothing_saved):
                best = worst
                result = {"step": num_steps, "minutes": round(minutes, 2), **accuracy}
                save(trainer.model, tokenizer, args.directory)
            progress.restart_lap(num_steps)

        if is_last:
            break
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("directory", type=Path, help="where to write the checkpoint")
    add("--start", type=Path, help="continue from this checkpoint, with rows of every length")
    add("--steps", type=int, default=4500, help="number of updates; each uses two batches")
    add("--minutes", type=float, default=20.0, help="stop after this time at the latest")
    add("--batch-tokens", type=int, default=33792, help="a multiple of the longest row")
    add("--longest", type=int, default=LENGTHS[-1], help="longest row, in tokens")
    add("--lr", type=float, default=3e-3, help="for vectors, embedding, head and router")
    add("--muon-lr", type=float, default=0.02, help="for all other matrices")
    add("--decay", type=float, default=0.55, help="share of the training in which the rate falls")
    add("--words", type=float, default=1.0, help="share of the steps that have word problems")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    default_workers = max(1, (os.cpu_count() or 2) - 2)
    add("--workers", type=int, default=default_workers, help="processes that make batches")
    add("--report", type=int, default=100, help="steps between two lines of output")
    add("--measure", type=int, default=250, help="steps between two measurements of accuracy")
    add("--seed", type=int, default=0)
    print(json.dumps(train(parser.parse_args())))


if __name__ == "__main__":
    main()
