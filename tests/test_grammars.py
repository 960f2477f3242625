"""Text that must fit a schema or grammar: in the engine, and against jsonschema and Python's re."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, permutations, product
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemas import schemas
from servers import wait_until
from tokenizer_files import make_llama, make_v2, make_v3, write_tokenizer
from transformers import PreTrainedTokenizerBase

from minidcp import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from minidcp.batch import Admission, StepPlan
from minidcp.engine import grammar
from minidcp.engine.grammar import CompiledGrammar, Grammars
from minidcp.engine.tokenizer import load_tokenizer
from minidcp.request import Request
from minidcp.worker.sampler import Sampler, mask_forbidden

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo-model"
PROMPT = (
    "Question: Ada has 25 pears. Ada finds 8 pears. Ada sells 6 pears. "
    "How many pears does Ada have now?\nAnswer:"
)
SOLUTION = " 25 + 8 = 33. 33 - 6 = 27. The answer is 27."
# How many schemas hypothesis makes. 500 by hand, fewer in CI.
NUM_SCHEMAS = int(os.environ.get("MINIDCP_TEST_SCHEMAS", "40"))
SCHEMAS_AT_ONCE = 20
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, device="cpu", ranks="threads", max_num_seqs=24, max_model_len=1024) as llm:
        yield llm


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(load_tokenizer(DEMO), vocab_size=1536, eos_ids=[1])
    yield grammars
    grammars.close()


def ask(llm: LLM, wanted: dict[str, Any], **how: Any) -> RequestOutput:
    fields = dict(max_tokens=64, temperature=0.0) | how
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**wanted), **fields)
    return llm.generate([PROMPT], params)[0]


def test_hypothesis_made_schemas_are_kept(llm: LLM) -> None:
    """At temperature 1. Every answer that ends by itself parses and validates."""
    ends = {"stop": 0, "length": 0}

    @settings(
        max_examples=NUM_SCHEMAS // SCHEMAS_AT_ONCE,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(schemas(), min_size=SCHEMAS_AT_ONCE, max_size=SCHEMAS_AT_ONCE))
    def check(batch: list[dict[str, Any]]) -> None:
        params = []
        for index, schema in enumerate(batch):
            is_compact = index % 2 == 0  # the model likes to fill its lines with spaces
            wanted = StructuredOutputsParams(json=schema, disable_any_whitespace=is_compact)
            params.append(SamplingParams(max_tokens=200, seed=index, structured_outputs=wanted))
        for schema, output in zip(batch, llm.generate([PROMPT] * len(batch), params), strict=True):
            completion = output.outputs[0]
            ends[completion.finish_reason] += 1
            if completion.finish_reason == "stop":
                validate(json.loads(completion.text), schema)

    check()
    print(f"{sum(ends.values())} schemas: {ends}")
    assert sum(ends.values()) >= NUM_SCHEMAS
    assert ends["stop"] > 0.7 * NUM_SCHEMAS  # the rest is cut, mostly within a number


def validate(value: Any, schema: Any) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)


def test_a_grammar_that_fits_changes_nothing(llm: LLM) -> None:
    """Greedy answers that fit by themselves are the same, token for token."""
    plain = llm.generate([PROMPT], SamplingParams(max_tokens=64, temperature=0.0))[0].outputs[0]
    assert plain.text == SOLUTION
    number = {"type": "integer"}
    parts = [" 25 + 8 = ", number, ". 33 - 6 = ", number, ". The answer is ", number, "."]
    for wanted in (
        dict(regex=r"( \d+ [-+] \d+ = \d+\.)+ The answer is \d+\."),
        dict(choice=["nothing", SOLUTION, " 25"]),
        dict(grammar="start: step+ answer\nstep: / \\d+ [-+] \\d+ = \\d+\\./\nanswer: / .*\\./"),
        dict(grammar=f'root ::= " 25 + 8 = " [0-9]+ {json.dumps(SOLUTION[12:])}'),
        dict(grammar=StructuredOutputsParams.from_parts(parts).grammar),
    ):
        completion = ask(llm, wanted).outputs[0]
        assert completion.text == SOLUTION, wanted
        assert completion.finish_reason == "stop"
        # Without the end-of-sequence token, where the grammar leaves no other choice.
        assert completion.token_ids == plain.token_ids[: len(completion.token_ids)]
        assert len(completion.token_ids) >= len(plain.token_ids) - 1


def test_ends(llm: LLM) -> None:
    """A grammar's end ends the answer, whatever else would have it longer."""
    digits = dict(regex="[0-9]{2,4}")
    assert ask(llm, digits).outputs[0].finish_reason == "stop"
    longest = ask(llm, digits, ignore_eos=True).outputs[0]
    assert len(longest.text) == 4 and longest.finish_reason == "stop"
    longest = ask(llm, digits, min_tokens=60).outputs[0]
    assert len(longest.text) == 4 and longest.finish_reason == "stop"

    endless = ask(llm, dict(regex="[0-9]+"), ignore_eos=True, max_tokens=9).outputs[0]
    assert len(endless.text) == 9 and endless.finish_reason == "length"
    late = ask(llm, dict(regex="[0-9]+"), min_tokens=7).outputs[0]
    assert len(late.text) >= 7 and late.finish_reason == "stop"

    cut = ask(llm, dict(regex=r"( \d+ [-+] \d+ = \d+\.)+"), stop="33").outputs[0]
    assert (cut.text, cut.finish_reason) == (" 25 + 8 = ", "stop")


def test_stop_tokens(llm: LLM) -> None:
    """They end an answer, but not before min_tokens, unless nothing else fits."""
    tokenizer = llm.engine.tokenizer
    (seven,) = tokenizer("7", add_special_tokens=False)["input_ids"]
    ids = dict(stop_token_ids=[seven])
    assert ask(llm, dict(regex="[78]7*8"), logit_bias={seven: 100}, **ids).outputs[0].text == ""
    early = ask(llm, dict(regex="[78]7*8"), logit_bias={seven: 100}, min_tokens=3, **ids)
    assert early.outputs[0].text == "88"
    forced = ask(llm, dict(regex="777[1-9]"), min_tokens=3, **ids).outputs[0]
    assert forced.text.startswith("777")


def test_biases_and_penalties_choose_among_what_fits(llm: LLM) -> None:
    tokenizer = llm.engine.tokenizer
    (five,) = tokenizer("5", add_special_tokens=False)["input_ids"]
    (a,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    digits = dict(regex="[0-9]{6}")
    assert ask(llm, digits, logit_bias={five: 100, a: 100}).outputs[0].text == "555555"
    text = ask(llm, digits, frequency_penalty=2, presence_penalty=2, repetition_penalty=9)
    assert len(set(text.outputs[0].text)) == 6
    for how in (dict(top_k=1), dict(top_p=0.01), dict(min_p=1.0)):
        sampled = ask(llm, digits, temperature=1.0, **how).outputs[0]
        assert sampled.text == ask(llm, digits).outputs[0].text


def test_logprobs_are_among_what_fits(llm: LLM) -> None:
    """As in vLLM, which masks logits before it takes log-probabilities."""
    entry = ask(llm, dict(choice=["no", "yes"]), logprobs=4).outputs[0].logprobs[0]
    top = [(token, value) for token, value in entry.top if value > -math.inf]
    assert [llm.engine.tokenizer.decode([token]) for token, _ in top] == ["n", "y"]
    assert sum(math.exp(value) for _, value in top) == pytest.approx(1)


def test_answers_do_not_depend_on_what_runs_beside(llm: LLM, crowded: None) -> None:
    """Beside plain requests, on four ranks, after preemption; sampled and greedy."""
    wanted = StructuredOutputsParams(json=PERSON)
    params = [
        SamplingParams(max_tokens=90, seed=seed, structured_outputs=wanted) for seed in (1, 2)
    ]
    params.append(SamplingParams(max_tokens=90, temperature=0.0, structured_outputs=wanted))
    plain = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    alone = [llm.generate([PROMPT], each)[0].outputs[0] for each in params]
    alone_plain = llm.generate([PROMPT], plain)[0].outputs[0]

    options = dict(tp_size=4, dcp_size=2, ranks="threads", device="cpu", max_model_len=256)
    with LLM(DEMO, num_blocks=17, max_num_seqs=8, block_size=8, **options) as small:
        together = small.generate([PROMPT] * 8, [*params, plain, *params, plain])
        assert small.engine.scheduler.num_preemptions > 0
        assert not small.engine.grammars.places
    texts = [each.text for each in [*alone, alone_plain]]
    assert [output.outputs[0].text for output in together] == texts * 2


def test_plain_requests_do_not_wait_for_a_slow_grammar(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_free = threading.Event()
    find_next = Grammars.find_next

    def wait(self: Grammars, *arguments: Any) -> bytes | None:
        assert is_free.wait(60)
        return find_next(self, *arguments)

    monkeypatch.setattr(Grammars, "find_next", wait)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(ask, llm, dict(regex="[0-9]{3}"))
        wait_until(lambda: llm.engine.grammars.num_pending == 1, 10, "the grammar is not asked")
        plain = llm.generate([PROMPT], SamplingParams(max_tokens=64, temperature=0.0))[0]
        assert plain.outputs[0].text == SOLUTION
        assert not slow.done()
        is_free.set()
        assert slow.result().outputs[0].text.isdigit()


def test_a_grammar_that_fails_ends_its_request_only(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llguidance's limits are reached in the middle of an answer."""
    monkeypatch.setattr(grammar, "LIMITS", grammar.LIMITS | {"max_lexer_states": 150})
    hard = StructuredOutputsParams(regex="(.*a.{9}){2}")
    easy = StructuredOutputsParams(regex="[0-9]{5}")
    params = [
        SamplingParams(max_tokens=64, seed=1, structured_outputs=wanted) for wanted in (hard, easy)
    ]
    failed, fine, plain = llm.generate([PROMPT] * 3, [*params, SamplingParams(max_tokens=9)])
    assert failed.outputs[0].finish_reason == "error"
    assert re.search(r"structured_outputs: .*failed after \d+ tokens", failed.outputs[0].error)
    assert "too many states" in failed.outputs[0].error
    assert fine.outputs[0].finish_reason == "stop"
    assert len(plain.outputs[0].token_ids) > 0
    assert not llm.engine.grammars.places and not llm.engine.requests


def test_a_mask_that_takes_too_long_ends_its_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = dict(regex="[0-9]{5}x{77}")
    ask(llm, wanted, max_tokens=2)  # compiles it
    monkeypatch.setattr(grammar, "MAX_MASK_SECONDS", -1.0)
    output = ask(llm, wanted).outputs[0]
    assert output.finish_reason == "error" and "a simpler grammar is needed" in output.error


def test_an_interrupted_call_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(llm, dict(json=PERSON))
    assert not engine.grammars.places and not engine.requests
    assert ask(llm, dict(choice=["a"])).outputs[0].text == "a"


# What is refused, and what the message says.
REFUSED = [
    (dict(json={"items": {"not": {}}}), r"at #/items: .*not"),
    (dict(json={"properties": {"x/y": {"type": "strin"}}}), r"at #/properties/x~1y: .*strin"),
    (
        dict(
            json={"$defs": {"a": {"anyOf": [{}, {"format": "x"}]}}, "items": {"$ref": "#/$defs/a"}}
        ),
        r"at #/\$defs/a/anyOf/1: .*format",
    ),
    (dict(json={"oneOf": [{"type": "integer"}, {"minimum": 3}]}), r"at #: oneOf"),
    (dict(json={"uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
    (dict(json={"type": "string", "pattern": "(?=a)b"}), "look-around"),
    (dict(json={"minProperties": 2}), "at #/minProperties"),
    (dict(json='{"type": '), "line 1 column"),
    (dict(json='{"minimum": NaN}'), "NaN"),
    (dict(json="[" * 100_000), "nested too deeply"),
    (dict(json="[1]"), "is an object"),
    (dict(json=False), "nothing fits"),
    (dict(json={"$ref": "#"}), "nothing fits"),
    (dict(json={"type": "string", "minLength": 3, "maxLength": 2}), "min"),
    (dict(json={"title": "x" * 200_000}), "131072"),
    (dict(json={"title": {1, 2}}), "cannot be written as JSON"),
    (dict(regex="(a"), "unclosed group"),
    (dict(regex=""), "empty text"),
    (dict(grammar="start: b"), "unknown name"),
    (dict(grammar="start: " + "(" * 50_000), "nested"),
    (dict(grammar="nonsense"), "."),
]


@pytest.mark.parametrize(("wanted", "words"), REFUSED, ids=lambda value: repr(value)[:60])
def test_what_is_refused(grammars: Grammars, wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        grammars.compile(StructuredOutputsParams(**wanted, field="guided_json"))
    assert str(refused.value).startswith("guided_json: ")
    assert len(str(refused.value)) < 700


CHAINS = {
    "rules": dict(
        grammar="start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(8000)) + 'a8000: "x"'
    ),
    "references": dict(
        json={
            "$ref": "#/$defs/0",
            "$defs": {
                **{str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(2500)},
                "2500": {},
            },
        }
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_long_chains_of_rules_end_nobody(kind: str) -> None:
    """With a stack of ordinary size llguidance ends the process."""
    script = (
        "from test_grammars import *\n"
        "grammars = Grammars(load_tokenizer(DEMO), vocab_size=1536, eos_ids=[1])\n"
        "try:\n"
        f"    grammars.compile_later(StructuredOutputsParams(**CHAINS[{kind!r}])).result()\n"
        "except ValueError as error:\n"
        "    print('refused', error)\n"
        "grammars.close()\n"
    )
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_grammar_that_has_failed_is_compiled_anew(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its copies share a lexer, whose states are used up. The next request must not get it."""
    wanted = StructuredOutputsParams(regex="(a|b){1,9}c")
    first = grammars.compile_later(wanted).result()
    request = Request("r", [5], SamplingParams(structured_outputs=wanted), 9, seed=0)
    grammars.open(request)

    def fail(*_: object) -> None:
        raise ValueError("too many states")

    monkeypatch.setattr(grammars, "find_next", fail)
    grammars.advance(request, 5)
    (outcome,) = grammars.collect(60)
    assert "too many states" in outcome.error
    grammars.drop(request)
    assert grammars.compile_later(wanted).result() is not first


def test_no_mask_is_computed_for_a_request_that_has_ended(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = StructuredOutputsParams(regex="[a-z]+")
    request = Request("r", [5], SamplingParams(structured_outputs=wanted), 9, seed=0)
    grammars.open(request)
    place = grammars.places["r"]
    grammars.drop(request)
    computed = []
    monkeypatch.setattr(grammars, "find_next", lambda *_: computed.append(1))
    grammars.work(place, 5, 1)
    assert grammars.outcomes.get().mask is None
    assert not computed


def test_wrong_parameters() -> None:
    for wanted, words in (
        (dict(), "exactly one of"),
        (dict(regex="a", json={}), "json and regex"),
        (dict(choice=[]), "choice"),
        (dict(choice=["a", ""]), "non-empty"),
        (dict(choice="ab"), "choice"),
        (dict(regex=5), "regex 5"),
        (dict(json=[1]), "JSON Schema"),
    ):
        with pytest.raises(ValueError, match=words):
            StructuredOutputsParams(**wanted)
    with pytest.raises(ValueError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})


def test_wrong_grammars_raise_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"(?s)structured_outputs: .*unclosed"):
        ask(llm, dict(regex="(a"))
    assert not llm.engine.requests


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    grammars = Grammars(load_tokenizer(DEMO), 1536, [1])
    with pytest.raises(ValueError, match=r"regex: needs the package.*pip install 'llguidance>="):
        grammars.compile(StructuredOutputsParams(regex="a", field="regex"))


def test_without_a_tokenizer() -> None:
    grammars = Grammars(None, 1536, [1])
    with pytest.raises(ValueError, match="no tokenizer"):
        grammars.compile(StructuredOutputsParams(regex="a"))


def test_compiled_grammars_are_kept(grammars: Grammars) -> None:
    first = grammars.compile(StructuredOutputsParams(json=PERSON))
    assert grammars.compile(StructuredOutputsParams(json=dict(PERSON))) is first
    compact = StructuredOutputsParams(json=PERSON, disable_any_whitespace=True)
    assert grammars.compile(compact) is not first
    for number in range(grammar.MAX_COMPILED + 1):
        grammars.compile(StructuredOutputsParams(regex=f"a{{{number + 1}}}"))
    assert len(grammars.recent) == grammar.MAX_COMPILED
    assert grammars.compile(StructuredOutputsParams(json=PERSON)) is first  # we still hold it


def test_grammars_of_parts(grammars: Grammars) -> None:
    """Texts, tokens by their ids, and JSON: as calls of tools need them."""
    begin = 0  # a special token
    cities = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    wanted = StructuredOutputsParams.from_parts(
        [begin, "f\n", cities | {"additionalProperties": False}, '"\\>'],
        ["g(", {"type": "integer"}, ")"],
        max_repeats=2,
    )
    compiled = grammars.compile(wanted)
    tokenizer = grammars.get_tokenizer()
    call_f = [begin, *tokenizer.tokenize_str('f\n{"city": "Rome"}"\\>')]
    call_g = tokenizer.tokenize_str("g(12)")
    for tokens, fits in (
        (call_f, True),
        (call_g, True),
        (call_f + call_g, True),
        (call_g * 3, False),
        (call_f[1:], False),
        ([], False),
    ):
        matcher = compiled.matcher.deep_copy()
        is_taken = matcher.try_consume_tokens(tokens) == len(tokens)
        assert (is_taken and matcher.is_accepting()) == fits, tokens


TEXTS = [
    dict(json=PERSON),
    dict(json={"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 3}),
    dict(regex=r"[a-zé日本 ]{3,9}[.!]"),
    dict(choice=["naïve", "日本語", "naïve text", "😀"]),
]


@pytest.mark.parametrize("make", [make_v2, make_v3, make_llama])
def test_random_walks_fit(make: Any, tmp_path: Path) -> None:
    """Tokenizers of each kind, with a padded vocabulary. Any allowed tokens give a text that fits,
    in whole characters."""
    directory = write_tokenizer(tmp_path, make())
    tokenizer = load_tokenizer(directory)
    eos = tokenizer.eos_token_id
    grammars = Grammars(tokenizer, vocab_size=len(tokenizer) + 77, eos_ids=[eos])
    random.seed(0)
    try:
        for wanted in TEXTS:
            for _ in range(5):
                ids = walk(grammars, StructuredOutputsParams(**wanted), eos, len(tokenizer))
                text = tokenizer.decode(ids, skip_special_tokens=True)
                check_text(text, wanted)
    finally:
        grammars.close()


def walk(
    grammars: Grammars, wanted: StructuredOutputsParams, eos: int, num_tokens: int
) -> list[int]:
    """Random allowed tokens up to the grammar's end."""
    params = SamplingParams(max_tokens=None, structured_outputs=wanted)
    request = Request("walk", [0], params, max_tokens=10_000, seed=0, stop_ids=(eos,))
    grammars.open(request)
    assert request.mask is not None
    ids: list[int] = []
    mask: bytes | None = request.mask
    while mask is not None:
        allowed = list_bits(mask)
        assert len(mask) == (grammars.vocab_size + 7) // 8
        assert allowed and max(allowed) < num_tokens
        token = eos if eos in allowed else random.choice(allowed)
        if token == eos:
            break
        ids.append(token)
        request.tokens.append(token)
        grammars.advance(request, token)
        (outcome,) = grammars.collect(60)
        assert outcome.error is None
        mask = outcome.mask
    grammars.drop(request)
    return ids


def check_text(text: str, wanted: dict[str, Any]) -> None:
    assert "\N{REPLACEMENT CHARACTER}" not in text
    if "json" in wanted:
        validate(json.loads(text), wanted["json"])
    elif "choice" in wanted:
        assert text in wanted["choice"]
    else:
        assert re.fullmatch(wanted["regex"], text)


def list_bits(mask: bytes) -> list[int]:
    return [token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1]


@settings(deadline=None)
@given(st.integers(1, 70), st.data())
def test_masks_of_logits_against_brute_force(vocab_size: int, data: st.DataObject) -> None:
    num_bytes = -(-vocab_size // 8)
    rows = data.draw(st.lists(st.integers(0, 5), min_size=1, unique=True))
    masks = {row: data.draw(st.binary(min_size=num_bytes, max_size=num_bytes)) for row in rows}
    logits = torch.randn(6, vocab_size)
    before = logits.clone()
    masked = mask_forbidden(logits, masks)
    assert torch.equal(logits, before)
    for row in range(6):
        allowed = list_bits(masks[row]) if row in masks else range(vocab_size)
        for token in range(vocab_size):
            expected = logits[row, token] if token in allowed else torch.tensor(-torch.inf)
            assert masked[row, token] == expected


def test_the_sampler_keeps_to_masks() -> None:
    """Greedy and sampled rows with masks beside rows without."""
    params = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_p=0.5)]
    sampler = Sampler()
    sampler.admit(StepPlan(admitted=[Admission(slot, p) for slot, p in enumerate(params * 2)]))
    rows = list(range(6))
    masks = {3: bytes([0b100, 0]), 4: bytes([0, 0b11]), 5: bytes([0b1000, 0])}
    plan = StepPlan(6, rows, rows, [1] * 6, sampling=rows, masks=masks)
    assert not sampler.takes_best(plan) and sampler.reads_logits(plan)
    assert not sampler.takes_best(plan.without_bits())  # as the other ranks see it
    assert plan.without_bits().masks == {3: b"", 4: b"", 5: b""}
    for _ in range(20):
        logits = torch.randn(6, 10)
        tokens = sampler.sample(logits, plan, logits.argmax(-1)).tokens.tolist()
        assert tokens[0] == logits[0].argmax()
        assert tokens[3] == 2 and tokens[4] in (8, 9) and tokens[5] == 3


# From the JSON-Schema-Test-Suite; there are more in `test_the_schema_suite`.
SUITE = os.environ.get("JSON_SCHEMA_TEST_SUITE", "")
# Integers are written without a fraction, and formats are enforced, where the suite has them as
# annotations. So fewer answers can be given than are valid.
NARROWER = {"const", "enum", "format", "type"}
UNSUPPORTED = {
    "defs",  # of which the suite has only references to the metaschema
    *("contains", "dependentRequired", "dependentSchemas", "dynamicRef", "if-then-else", "not"),
    *("maxContains", "minContains", "propertyNames", "refRemote", "uniqueItems", "vocabulary"),
    *("unevaluatedItems", "unevaluatedProperties"),
}


@pytest.mark.skipif(not SUITE, reason="JSON_SCHEMA_TEST_SUITE does not say where the suite is")
def test_the_schema_suite(grammars: Grammars) -> None:
    """The required cases of draft 2020-12. A schema is refused, or no invalid value fits it; and
    all valid ones do, but for NARROWER."""
    counts = {"refused schemas": 0, "schemas": 0, "cases": 0, "narrower": 0}
    for file in sorted(Path(SUITE, "tests", "draft2020-12").glob("*.json")):
        refused = 0
        groups = json.loads(file.read_text(encoding="utf-8"))
        for group in groups:
            try:
                compiled = grammars.compile(StructuredOutputsParams(json=group["schema"]))
            except ValueError:
                refused += 1
                continue
            counts["schemas"] += 1
            for case in group["tests"]:
                counts["cases"] += 1
                is_accepted = fits_in_some_order(grammars, compiled, case["data"])
                what = (file.stem, group["description"], case["description"])
                assert case["valid"] or not is_accepted, what
                if case["valid"] and not is_accepted:
                    counts["narrower"] += 1
                    assert file.stem in NARROWER, what
        counts["refused schemas"] += refused
        if file.stem in UNSUPPORTED:
            assert refused > 0, f"{file.stem} is supported"
        elif file.stem != "boolean_schema":
            assert refused < len(groups), f"nothing of {file.stem} is supported"
    print(counts)
    assert counts["cases"] > 500


def fits_in_some_order(grammars: Grammars, compiled: CompiledGrammar, value: Any) -> bool:
    """Whether a value can be the answer. Schemas fix the order of an object's keys."""
    tokenizer = grammars.get_tokenizer()
    for ordered in list_orders(value):
        ids = tokenizer.tokenize_str(json.dumps(ordered, ensure_ascii=False))
        matcher = compiled.matcher.deep_copy()
        if matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting():
            return True
    return False


def list_orders(value: Any) -> Iterator[Any]:
    """The value with the keys of its objects in different orders."""
    if isinstance(value, dict):
        items = [[(key, part) for part in list_orders(value[key])] for key in value]
        for order in islice(permutations(items), 24):
            yield from map(dict, islice(product(*order), 50))
    elif isinstance(value, list):
        parts = [list(islice(list_orders(part), 6)) for part in value]
        yield from map(list, islice(product(*parts), 50))
    else:
        yield value


def test_a_padded_tokenizer_without_eos(tmp_path: Path) -> None:
    """A model without an end-of-sequence token: only the grammar's end ends an answer."""
    tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(DEMO)
    grammars = Grammars(tokenizer, vocab_size=1536, eos_ids=[])
    wanted = StructuredOutputsParams(regex="[0-9]{1,3}")
    params = SamplingParams(structured_outputs=wanted)
    request = Request("a", [0], params, max_tokens=9, seed=0)
    grammars.open(request)
    while request.mask is not None:
        token = list_bits(request.mask)[0]
        assert token not in grammars.get_tokenizer().eos_tokens
        request.tokens.append(token)
        grammars.advance(request, token)
        request.mask = grammars.collect(60)[0].mask
    assert request.num_outputs == 3
    grammars.close()
