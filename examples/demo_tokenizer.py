"""The demo model's tokenizer, a byte-level BPE.

Every digit, every newline and every word of the problems is one token. Any other text is spelled in
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from demo_problems import ADJECTIVES, CITIES, NAMES, NOUNS, OBJECTS, make_context, make_word_problem
from make_demo_checkpoint import BOS, EOS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SIZE = 2000
# If a text is cut where one of these pieces ends, its parts have the same tokens as the whole.
PIECE = r"\d|\n| ?\p{L}+| ?[^\s\p{L}\d]+|\s"


def make_sample(seed: int) -> Iterator[str]:
    """Text to train the tokenizer on: every word of the problems, then problems and contexts."""
    rng = Random(seed)
    labels = ("Question", "Answer", "User", "Assistant")
    for word in (*NAMES, *OBJECTS, *ADJECTIVES, *NOUNS, *CITIES, *labels):
        yield f"{word} {word} " * 20
    for _ in range(3000):
        problem = make_word_problem(rng, held_out=False)
        yield f"Question: {problem.question}\nAnswer: {problem.answer}\n"
        yield make_context(rng, len, 400).text


def make_tokenizer(seed: int) -> Tokenizer:
    """A tokenizer with at most SIZE tokens that puts BOS in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_sample(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer
