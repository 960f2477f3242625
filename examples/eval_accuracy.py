"""How many of the demo model's problems are answered right: by a server, by the engine, or by transformers.

    python examples/eval_accuracy.py examples/demo-model --device cpu --json tp1.json
    python examples/eval_accuracy.py --url http://127.0.0.1:8000 --reference tp1.json

Word problems come after five examples; what is to be looked up stands in up to 8,192 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from demo_problems import Context, Problem, make_context, make_word_problem
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minidcp import LLM, SamplingParams
from minidcp.cli import add_engine_flags, engine_config

DEMO = Path(__file__).parent / "demo-model"
SEED, SHOTS = 2026, 5  # training draws from other seeds, and never draws a word problem that is held out
CONTEXT_TOKENS = (1024, 2048, 4096, 8192)
MAX_TOKENS = 96
KINDS = ("words", "retrieval", "chat")


class Completion(NamedTuple):
    tokens: list[int]
    logprob: float | None = None  # of all of them together, where it is known


Answerer = Callable[[list[list[int]]], list[Completion]]  # of prompts, all at once


@dataclass(frozen=True)
class Question:
    kind: str
    prompt: list[int]
    result: str


@dataclass(frozen=True)
class Answer:
    """`tokens` up to the end of the line or of the text, without what ends it."""

    kind: str
    result: str
    text: str
    tokens: list[int]
    right: bool
    logprob: float | None


def render(problem: Problem, with_answer: bool = False) -> str:
    end = f" {problem.answer}\n\n" if with_answer else ""
    return f"Question: {problem.question}\nAnswer:{end}"


def pick_fact(context: Context, place: float) -> Problem:
    """What can be asked about the piece nearest to that place, 0 being the beginning and 1 the end."""
    wanted = place * len(context.pieces)
    return min(context.facts, key=lambda fact: abs(fact[0] - wanted))[1]


def make_texts(kind: str, number: int, length_of: Callable[[str], int], longest: int) -> Iterator[tuple[str, str]]:
    """Prompts and results. Contexts have four lengths; in each, needles stand from one end to the other."""
    rng = Random(f"{SEED} {kind}")
    lengths = [n for n in CONTEXT_TOKENS if n <= longest] or [longest]
    examples = "".join(render(make_word_problem(rng, held_out=False), True) for _ in range(SHOTS))
    for i in range(number):
        if kind == "retrieval":
            place = (i // len(lengths) + 0.5) / -(-number // len(lengths))
            context = make_context(rng, length_of, lengths[i % len(lengths)] - 32)
            problem = pick_fact(context, place)
            yield f"{context.text}\n\n{render(problem)}", problem.result
        else:
            problem = make_word_problem(rng, held_out=True)
            yield problem.question if kind == "chat" else examples + render(problem), problem.result


def make_questions(
    tokenizer: PreTrainedTokenizerBase, kind: str, number: int, longest: int = CONTEXT_TOKENS[-1]
) -> list[Question]:
    def length_of(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    questions = []
    for text, result in make_texts(kind, number, length_of, longest):
        if kind == "chat":
            message = [{"role": "user", "content": text}]
            text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        prompt = tokenizer.encode(text, add_special_tokens=kind != "chat")
        if kind == "retrieval" and len(prompt) > longest:
            raise ValueError(f"a prompt of {len(prompt)} tokens; at most {longest} were wanted")
        questions.append(Question(kind, prompt, result))
    return questions


def judge(tokenizer: PreTrainedTokenizerBase, question: Question, completion: Completion) -> Answer:
    """Right is what ends with the result."""
    tokens, ends = completion.tokens, find_ends(tokenizer)
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = str(tokenizer.decode(tokens[:stop])).strip()
    words = text.removesuffix(".").split()
    right = words[-1:] == [question.result]
    return Answer(question.kind, question.result, text, tokens[:stop], right, completion.logprob)


def find_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """EOS and the newline: an answer is one line."""
    return [int(tokenizer.eos_token_id), *tokenizer.encode("\n", add_special_tokens=False)]


def answer_all(
    tokenizer: PreTrainedTokenizerBase, questions: list[Question], complete: Answerer, concurrency: int
) -> list[Answer]:
    """`concurrency` questions go together; the answers are in the questions' order."""
    completions: list[Completion] = []
    for start in range(0, len(questions), concurrency):
        completions += complete([q.prompt for q in questions[start : start + concurrency]])
    return [judge(tokenizer, q, c) for q, c in zip(questions, completions, strict=True)]


def use_engine(llm: LLM, ends: list[int]) -> Answerer:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=ends, logprobs=0)

    def complete(prompts: list[list[int]]) -> list[Completion]:
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        return [Completion(o.token_ids, sum(p.logprob for p in o.logprobs or [])) for o in outputs]

    return complete


def use_server(url: str, tokenizer: PreTrainedTokenizerBase) -> Answerer:
    """One request a prompt, all at a time. A text has only one tokenization that the model writes."""

    def post(prompt: list[int]) -> Completion:
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0.0, "stop": ["\n"]}
        request = urllib.request.Request(
            f"{url.rstrip('/')}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            text = json.load(response)["choices"][0]["text"]
        return Completion(tokenizer.encode(text, add_special_tokens=False))

    def complete(prompts: list[list[int]]) -> list[Completion]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(post, prompts))

    return complete


def use_transformers(path: str, device: str, dtype: str, ends: list[int]) -> Answerer:
    """transformers' own generate, prompts padded on the left."""
    import torch
    from transformers import DeepseekV2ForCausalLM

    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = ("bfloat16" if where == "cuda" else "float32") if dtype == "auto" else dtype
    model: Any = DeepseekV2ForCausalLM.from_pretrained(path, dtype=getattr(torch, kind))
    model = model.to(where).eval()

    def complete(prompts: list[list[int]]) -> list[Completion]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=where)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=where)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False,
                eos_token_id=ends, pad_token_id=ends[0],
            )  # fmt: skip
        return [Completion(row[longest:].tolist()) for row in out]

    return complete


def find_interval(right: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.959964, right / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    return round(middle - half, 9), round(middle + half, 9)  # exactly 0 or 1 where they are


def summarize(answers: list[Answer], reference: list[Answer] | None = None) -> dict[str, dict[str, Any]]:
    """For each kind: accuracy and its interval. Against the reference: how many answers have other tokens,
    and how far the log-probability of those with the same tokens is off at most."""
    table: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(a.kind for a in answers):
        ours = [a for a in answers if a.kind == kind]
        right = sum(a.right for a in ours)
        low, high = find_interval(right, len(ours))
        table[kind] = {
            "questions": len(ours),
            "right": right,
            "accuracy": right / len(ours),
            "low": low,
            "high": high,
        }
        if reference is not None:
            theirs = [a for a in reference if a.kind == kind]
            same = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.tokens == b.tokens]
            table[kind]["differ"] = len(ours) - len(same)
            known = [(a.logprob, b.logprob) for a, b in same]
            drifts = [abs(x - y) for x, y in known if x is not None and y is not None]
            table[kind]["drift"] = max(drifts, default=None)
    return table


def read_answers(file: Path) -> list[Answer]:
    return [Answer(**answer) for answer in json.loads(file.read_text())["answers"]]


@contextmanager
def open_answerer(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[Answerer]:
    if args.url:
        yield use_server(args.url, tokenizer)
    elif args.transformers:
        yield use_transformers(args.model or str(DEMO), args.device, args.dtype, find_ends(tokenizer))
    else:
        config = engine_config(args)
        with LLM(**asdict(config)) as llm:
            yield use_engine(llm, find_ends(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser)
    parser.add_argument("--url", help="ask a running server instead of starting an engine")
    parser.add_argument("--transformers", action="store_true", help="ask transformers instead")
    parser.add_argument("--questions", type=int, default=200, help="of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of them, by commas")
    parser.add_argument("--longest", type=int, default=CONTEXT_TOKENS[-1], help="tokens of a retrieval prompt")
    parser.add_argument("--concurrency", type=int, default=64, help="questions asked together")
    parser.add_argument("--json", type=Path, help="write figures and answers there")
    parser.add_argument("--reference", type=Path, help="such a file, to count answers that differ from it")
    args = parser.parse_args()
    reference = read_answers(args.reference) if args.reference else None
    tokenizer = AutoTokenizer.from_pretrained(args.model_flag or args.model or DEMO)

    answers, start = [], time.perf_counter()
    with open_answerer(args, tokenizer) as complete:
        for kind in args.kinds.split(","):
            questions = make_questions(tokenizer, kind, args.questions, args.longest)
            answers += answer_all(tokenizer, questions, complete, args.concurrency)
    table = summarize(answers, reference)
    print(f"{'kind':<10} {'right':>9} {'accuracy':>8} {'95 % interval':>16} {'differ':>7}")
    for kind, row in table.items():
        print(f"{kind:<10} {row['right']:>4}/{row['questions']:<4} {row['accuracy']:>8.3f} "
              f"{row['low']:>8.3f}–{row['high']:.3f}  {row.get('differ', '-'):>7}")  # fmt: skip
    print(f"{time.perf_counter() - start:.1f} s")
    if args.json:
        content = {"summary": table, "answers": [asdict(a) for a in answers]}
        args.json.write_text(json.dumps(content, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
