"""The demo model gives the right answers in every configuration, in fp32 on a CPU."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
import torch
from accuracy_matrix import list_engines, run_matrix
from demo_forward import TrainingForward
from demo_problems import make_context, make_word_problem
from demo_rows import ANSWERS, SILENT, Tokenize, count_tokens, make_batch
from eval_accuracy import DEMO, find_interval, make_questions, pick_fact
from transformers import AutoTokenizer, DeepseekV2ForCausalLM, PreTrainedTokenizerBase

from minidcp import LLM, SamplingParams

COMMON = dict(
    device="cpu",
    dtype="float32",
    ranks="threads",
    max_model_len=1024,
    num_blocks=256,
    max_num_seqs=8,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


def test_every_engine_gives_the_right_answers_and_the_tokens_of_one_rank(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    questions = [
        *make_questions(tokenizer, "words", 1),
        *make_questions(tokenizer, "retrieval", 3, longest=256),
        *make_questions(tokenizer, "chat", 2),
    ]
    # Some contexts cannot be divided evenly over eight ranks.
    assert {len(q.prompt) % 8 for q in questions} != {0}
    engines = list_engines(["a2a", "ag_rs"], ["reference"], ["wide", "narrow"], [False])
    assert len(engines) == 5
    cells = list(run_matrix(str(DEMO), engines, COMMON, questions, [8]))
    assert [c.name for c in cells] == ["tp1", *engines]
    for cell in cells:
        for kind, row in cell.summary.items():
            assert row["differ"] == 0, f"{cell.name}: {kind}"
            assert row["accuracy"] == 1.0, f"{cell.name}: {kind}"
            # The model is so sure of its answers that LSEs in the wrong base change none of them.
            # But they change this by 0.02.
            assert row["drift"] < 1e-5, f"{cell.name}: {kind}"


def test_the_readme_shows_the_models_own_answer() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    prompt = re.search(r'"prompt": "(Question: .*?)"}', readme)
    answer = re.search(r"It answers, a token at a time: `(.*?)`", readme)
    assert prompt and answer
    with LLM(DEMO, **COMMON) as llm:
        params = SamplingParams(max_tokens=64, temperature=0.0)
        completion = llm.generate([prompt[1].replace("\\n", "\n")], params)[0].outputs[0]
    assert completion.text == answer[1]
    assert completion.finish_reason == "stop"


def test_the_forward_for_training_is_transformers_own() -> None:
    model = DeepseekV2ForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokens = torch.randint(2, 1400, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, right, _ = TrainingForward(model, torch.float32)(tokens)
        logits = model(tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    assert (loss - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(right, logits.argmax(-1) == tokens[:, 1:])


def test_worked_steps_are_right() -> None:
    rng = Random(0)
    for _ in range(500):
        problem = make_word_problem(rng, held_out=True)
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", problem.answer)
        assert 2 <= len(steps) <= 4
        for a, operator, b, value in steps:
            x, y, z = int(a), int(b), int(value)
            assert {"+": x + y == z, "-": x - y == z, "*": x * y == z, "/": y * z == x}[operator], (
                problem
            )
        assert problem.answer.endswith(f"{steps[-1][3]}. The answer is {problem.result}.")
        assert steps[-1][3] == problem.result


def test_no_held_out_problem_is_trained_on() -> None:
    rng = Random(1)
    trained = {make_word_problem(rng, held_out=False).question for _ in range(2000)}
    assert not trained & {make_word_problem(rng, held_out=True).question for _ in range(200)}


@pytest.mark.parametrize(
    ("kind", "length"), [("words", 528), ("retrieval", 264), ("retrieval", 1056)]
)
def test_what_is_trained_on_are_whole_answers(
    tokenizer: PreTrainedTokenizerBase, kind: str, length: int
) -> None:
    tokenize = Tokenize(tokenizer.backend_tokenizer)
    batch = make_batch(Random(0), tokenize, kind, 4, length)
    assert batch.tokens.shape == batch.labels.shape == (4, length)
    statement = r"The answer is \d+|The code of the \w+ \w+ is \d{4}|The \w+ \w+ lives in \w+"
    shape = rf" (.* )?({statement})\.(\n|<.*>)?"
    for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
        assert tokens[0] == tokenizer.bos_token_id and labels[0] == SILENT
        answers = [tokens[labels == label].tolist() for label in range(ANSWERS, labels.max() + 1)]
        assert answers
        for answer in answers[:-1]:  # the row may end within the last answer
            assert re.fullmatch(shape, tokenizer.decode(answer)), tokenizer.decode(answer)


def test_needles_stand_where_they_should(tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(20):
        context = make_context(Random(seed), count_tokens, 2000)
        ids = tokenizer.encode(context.text, add_special_tokens=False)
        assert len(ids) == sum(map(count_tokens, context.pieces)) <= 2000
        for index, problem in context.facts:
            assert problem.result in context.pieces[index]
        for place in (0.05, 0.5, 0.95):
            index = next(i for i, problem in context.facts if problem == pick_fact(context, place))
            assert abs(index / len(context.pieces) - place) < 0.25


def test_interval() -> None:
    assert find_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert find_interval(0, 10)[0] == 0.0
    for number in range(1, 300):
        assert find_interval(number, number)[1] == 1.0


def test_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Grüße 😀: 3,074 of 99"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    assert len(tokenizer.encode(" 3074", add_special_tokens=False)) == 5  # one token for each digit
    message = [{"role": "user", "content": "Hello"}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert chat == f"{tokenizer.bos_token}User: Hello\n\nAssistant:"
