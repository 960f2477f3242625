"""Count how many of the demo model's problems a server, the engine, or transformers solves.

    python examples/eval_accuracy.py examples/demo-model --device cpu --json tp1.json
    python examples/eval_accuracy.py --url http://127.0.0.1:8000 --reference tp1.json

A word problem follows five solved examples. A retrieval context has up to 8,192 tokens.
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
SEED = 2026  # training uses other seeds, and never draws a held-out word problem
SHOTS = 5
CONTEXT_TOKENS = (1024, 2048, 4096, 8192)
MAX_TOKENS = 96
KINDS = ("words", "retrieval", "chat")


class Completion(NamedTuple):
    tokens: list[int]
    logprob: float | None = None  # the sum over all tokens, where it is known


Answerer = Callable[[list[list[int]]], list[Completion]]  # completes a list of prompts together


@dataclass(frozen=True)
class Question:
    kind: str
    prompt: list[int]
    result: str


@dataclass(frozen=True)
class Answer:
    """The answer to a question. `tokens` ends before the token that ends the line or the text."""

    kind: str
    result: str
    text: str
    tokens: list[int]
    right: bool
    logprob: float | None


def render(problem: Problem, with_answer: bool = False) -> str:
    end = f" {problem.answer}\n\n" if with_answer else ""
    return f"Question: {problem.question}\nAnswer:{end}"


def pick_fact(context: Context, depth: float) -> Problem:
    """Pick the problem whose fact is nearest to `depth`: 0 is the context's start and 1 its end."""
    wanted = depth * len(context.pieces)
    _, problem = min(context.facts, key=lambda fact: abs(fact[0] - wanted))
    return problem


def make_texts(
    kind: str, number: int, length_of: Callable[[str], int], longest: int
) -> Iterator[tuple[str, str]]:
    """Make prompts with the result that each one asks for.

    Contexts take turns at four lengths. At each length, the needles are spread from the start to
    the end.
    """
    rng = Random(f"{SEED} {kind}")
    lengths = [n for n in CONTEXT_TOKENS if n <= longest] or [longest]
    contexts_per_length = math.ceil(number / len(lengths))
    examples = "".join(render(make_word_problem(rng, held_out=False), True) for _ in range(SHOTS))
    for i in range(number):
        if kind == "retrieval":
            depth = (i // len(lengths) + 0.5) / contexts_per_length
            context = make_context(rng, length_of, lengths[i % len(lengths)] - 32)
            problem = pick_fact(context, depth)
            text = f"{context.text}\n\n{render(problem)}"
        else:
            problem = make_word_problem(rng, held_out=True)
            text = problem.question if kind == "chat" else examples + render(problem)
        yield text, problem.result


def make_questions(
    tokenizer: PreTrainedTokenizerBase, kind: str, number: int, longest: int = CONTEXT_TOKENS[-1]
) -> list[Question]:
    """Make questions of one kind. Retrieval prompts have at most `longest` tokens."""

    def length_of(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    questions = []
    for text, result in make_texts(kind, number, length_of, longest):
        if kind == "chat":
            messages = [{"role": "user", "content": text}]
            text = str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        # The chat template writes the special tokens itself.
        prompt = tokenizer.encode(text, add_special_tokens=kind != "chat")
        if kind == "retrieval" and len(prompt) > longest:
            raise ValueError(f"a prompt of {len(prompt)} tokens; at most {longest} were wanted")
        questions.append(Question(kind, prompt, result))
    return questions


def judge(tokenizer: PreTrainedTokenizerBase, question: Question, completion: Completion) -> Answer:
    """An answer is right if its last word is the result."""
    tokens = completion.tokens
    ends = find_ends(tokenizer)
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    tokens = tokens[:length]

    text = str(tokenizer.decode(tokens)).strip()
    words = text.removesuffix(".").split()
    right = words[-1:] == [question.result]
    return Answer(question.kind, question.result, text, tokens, right, completion.logprob)


def find_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: EOS, and the newline because an answer is one line."""
    return [int(tokenizer.eos_token_id), *tokenizer.encode("\n", add_special_tokens=False)]


def answer_all(
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    complete: Answerer,
    concurrency: int,
) -> list[Answer]:
    """Ask `concurrency` questions at a time. The answers are in the order of the questions."""
    completions: list[Completion] = []
    for start in range(0, len(questions), concurrency):
        together = questions[start : start + concurrency]
        completions += complete([question.prompt for question in together])
    return [
        judge(tokenizer, question, completion)
        for question, completion in zip(questions, completions, strict=True)
    ]


def use_engine(llm: LLM, ends: list[int]) -> Answerer:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=ends, logprobs=0)

    def complete(prompts: list[list[int]]) -> list[Completion]:
        completions = []
        for request in llm.generate(prompts, params):
            output = request.outputs[0]
            logprob = sum(token.logprob for token in output.logprobs or [])
            completions.append(Completion(output.token_ids, logprob))
        return completions

    return complete


def use_server(url: str, tokenizer: PreTrainedTokenizerBase) -> Answerer:
    """Send one request for each prompt, all at the same time.

    The server returns text. Its tokens are recovered by encoding it, because the model writes every
    text in only one tokenization.
    """

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
    """Use transformers' own generate, with prompts padded on the left."""
    import torch
    from transformers import DeepseekV2ForCausalLM

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    model: Any = DeepseekV2ForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model = model.to(device).eval()

    def complete(prompts: list[list[int]]) -> list[Completion]:
        longest = max(len(prompt) for prompt in prompts)
        ids = []
        mask = []
        for prompt in prompts:
            padding = [0] * (longest - len(prompt))
            ids.append(padding + prompt)
            mask.append(padding + [1] * len(prompt))
        with torch.no_grad():
            out = model.generate(
                torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
        return [Completion(row[longest:].tolist()) for row in out]

    return complete


def find_interval(right: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    share = right / number
    scale = 1 + z * z / number
    middle = (share + z * z / (2 * number)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    # Rounded, so that a bound that is 0 or 1 is exactly that.
    return round(middle - half, 9), round(middle + half, 9)


def compare(answers: list[Answer], reference: list[Answer]) -> dict[str, Any]:
    """Compare answers with a reference's answers to the same questions.

    Returns:
        "differ", the number of answers with other tokens, and "drift", the largest difference in
        log-probability between answers with the same tokens (None if no log-probability is known).
    """
    num_same = 0
    drifts = []
    for answer, expected in zip(answers, reference, strict=True):
        if answer.tokens != expected.tokens:
            continue
        num_same += 1
        if answer.logprob is not None and expected.logprob is not None:
            drifts.append(abs(answer.logprob - expected.logprob))
    return {"differ": len(answers) - num_same, "drift": max(drifts, default=None)}


def summarize(
    answers: list[Answer], reference: list[Answer] | None = None
) -> dict[str, dict[str, Any]]:
    """The accuracy, its interval and the comparison with the reference, by kind of question."""
    table: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(answer.kind for answer in answers):
        ours = [answer for answer in answers if answer.kind == kind]
        right = sum(answer.right for answer in ours)
        low, high = find_interval(right, len(ours))
        table[kind] = {
            "questions": len(ours),
            "right": right,
            "accuracy": right / len(ours),
            "low": low,
            "high": high,
        }
        if reference is not None:
            theirs = [answer for answer in reference if answer.kind == kind]
            table[kind].update(compare(ours, theirs))
    return table


def print_summary(table: dict[str, dict[str, Any]]) -> None:
    print(f"{'kind':<10} {'right':>9} {'accuracy':>8} {'95 % interval':>16} {'differ':>7}")
    for kind, row in table.items():
        print(
            f"{kind:<10} {row['right']:>4}/{row['questions']:<4} {row['accuracy']:>8.3f} "
            f"{row['low']:>8.3f}–{row['high']:.3f}  {row.get('differ', '-'):>7}"
        )


def read_answers(file: Path) -> list[Answer]:
    return [Answer(**answer) for answer in json.loads(file.read_text())["answers"]]


@contextmanager
def open_answerer(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Answerer]:
    ends = find_ends(tokenizer)
    if args.url:
        yield use_server(args.url, tokenizer)
    elif args.transformers:
        yield use_transformers(args.model or str(DEMO), args.device, args.dtype, ends)
    else:
        with LLM(**asdict(engine_config(args))) as llm:
            yield use_engine(llm, ends)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    add = parser.add_argument
    add("--url", help="ask a running server instead of starting an engine")
    add("--transformers", action="store_true", help="ask transformers instead")
    add("--questions", type=int, default=200, help="number of questions of each kind")
    add("--kinds", default=",".join(KINDS), help="kinds of questions, separated by commas")
    add(
        "--longest",
        type=int,
        default=CONTEXT_TOKENS[-1],
        help="longest retrieval prompt, in tokens",
    )
    add("--concurrency", type=int, default=64, help="number of questions asked at a time")
    add("--json", type=Path, help="write the summary and the answers to this file")
    add("--reference", type=Path, help="compare the answers with those in this file, from --json")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    reference = read_answers(args.reference) if args.reference else None
    tokenizer = AutoTokenizer.from_pretrained(args.model_flag or args.model or DEMO)

    start = time.perf_counter()
    answers: list[Answer] = []
    with open_answerer(args, tokenizer) as complete:
        for kind in args.kinds.split(","):
            questions = make_questions(tokenizer, kind, args.questions, args.longest)
            answers += answer_all(tokenizer, questions, complete, args.concurrency)

    table = summarize(answers, reference)
    print_summary(table)
    print(f"{time.perf_counter() - start:.1f} s")
    if args.json:
        content = {"summary": table, "answers": [asdict(answer) for answer in answers]}
        args.json.write_text(json.dumps(content, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
