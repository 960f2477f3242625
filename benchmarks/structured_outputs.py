"""What grammars cost: plain requests beside others with a JSON Schema, and the time of a mask.

python benchmarks/structured_outputs.py examples/demo-model
"""

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minidcp import LLM, SamplingParams, StructuredOutputsParams
from minidcp.engine.grammar import Grammars
from minidcp.request import Request

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["name", "age", "tags", "zip"],
    "additionalProperties": False,
}
PEOPLE = StructuredOutputsParams(json={"type": "array", "items": PERSON})
ANSWER = '{"name": "Rosa Miller", "age": 17, "tags": ["aloud", "be good", "chair"], "zip": "12345"}'
PROMPT = "Question: Ada has 25 pears. Ada finds 8 pears. How many pears does Ada have now?\nAnswer:"


def measure_plain(llm: LLM, others: SamplingParams, num_streams: int, num_tokens: int) -> float:
    """Tokens per second of plain requests, while as many others run all the time."""
    plain = SamplingParams(max_tokens=num_tokens, temperature=1.0, seed=1, ignore_eos=True)
    beside = threading.Thread(target=llm.generate, args=([PROMPT] * num_streams, others))
    beside.start()
    while len(llm.engine.scheduler.running) < num_streams:
        time.sleep(0.001)

    start = time.perf_counter()
    outputs = llm.generate([PROMPT] * num_streams, plain)
    seconds = time.perf_counter() - start
    assert beside.is_alive(), "the others have ended too early"
    llm.engine_thread.calls[0].is_abandoned = True
    beside.join()
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def compare_throughput(model: str, num_streams: int, num_tokens: int, repeats: int) -> None:
    long = dict(max_tokens=4 * num_tokens, temperature=1.0, seed=2, ignore_eos=True)
    plain = SamplingParams(**long)  # type: ignore[arg-type]
    constrained = SamplingParams(**long, structured_outputs=PEOPLE)  # type: ignore[arg-type]
    with LLM(model, device="cpu", ranks="threads", max_num_seqs=2 * num_streams) as llm:
        measure_plain(llm, constrained, num_streams, 8)
        ratios = []
        for _ in range(repeats):
            beside_plain = measure_plain(llm, plain, num_streams, num_tokens)
            beside_constrained = measure_plain(llm, constrained, num_streams, num_tokens)
            ratios.append(beside_constrained / beside_plain)
            print(
                f"{num_streams} plain streams: {beside_plain:.0f} tok/s beside as many plain ones, "
                f"{beside_constrained:.0f} beside as many with a schema: {ratios[-1]:.2f} of it"
            )
        print(f"median {statistics.median(ratios):.2f}")


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on made-up words."""
    random.seed(0)
    starts = [*"bcdfghjklmnpqrstvwxz", "br", "st", "tr", "ch", "sh", "th", "pl", "kr"]
    ends = [*"aeiou", "ai", "ee", "oo", "ou", "er", "an", "in", "on", "en"]
    syllables = [start + end for start in starts for end in ends]

    def write_lines() -> Iterator[str]:
        for _ in range(8000):
            words = ["".join(random.choices(syllables, k=random.randint(1, 4))) for _ in range(60)]
            yield json.dumps({words[0]: words[1:], words[2]: random.random()}, indent=1)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(write_lines(), trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<eos>"
    )
    return wrapped


def measure_masks(vocab_size: int) -> None:
    """The time from a token to the mask after it, one after the other, and how many at once."""
    tokenizer = make_tokenizer(vocab_size)
    grammars = Grammars(tokenizer, vocab_size, [1])
    wanted = StructuredOutputsParams(json=PERSON)
    start = time.perf_counter()
    grammars.get_tokenizer()
    print(f"tokenizer of {vocab_size} tokens: {time.perf_counter() - start:.2f} s, once")
    start = time.perf_counter()
    held = grammars.compile(wanted)
    print(f"schema compiled in {(time.perf_counter() - start) * 1e3:.1f} ms")

    params = SamplingParams(structured_outputs=wanted)
    answer = tokenizer.encode(ANSWER)
    for name in ("first", "second"):
        request = Request(name, [0], params, max_tokens=1000, seed=0, stop_ids=(1,))
        grammars.open(request)
        times = []
        for token in answer:
            request.tokens.append(token)
            start = time.perf_counter()
            grammars.advance(request, token)
            (outcome,) = grammars.collect(10)
            times.append((time.perf_counter() - start) * 1e6)
            assert outcome.error is None
        print(
            f"{name} time: {len(times)} masks of {len(held.mask)} bytes, "
            f"{statistics.mean(times):.0f} µs each (median {statistics.median(times):.0f}, "
            f"longest {max(times):.0f})"
        )
    grammars.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=102_400)
    options = parser.parse_args()
    measure_masks(options.vocab_size)
    compare_throughput(options.model, options.streams, options.tokens, options.repeats)


if __name__ == "__main__":
    main()
