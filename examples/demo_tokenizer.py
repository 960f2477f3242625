"""The demo model's tokenizer: byte-level BPE, every digit and newline a token of its own.

Each word of the problems becomes one token; any other text is spelled in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from demo_problems import ADJECTIVES, CITIES, NAMES, NOUNS, OBJECTS, make_context, make_word_problem
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SIZE = 2000
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# A text can be cut wherever one of these ends, and its parts have the tokens of the whole.
PIECE = r"\d|\n| ?\p{L}+| ?[^\s\p{L}\d]+|\s"


def make_sample(seed: int) -> Iterator[str]:
    rng = Random(seed)
    for word in (*NAMES, *OBJECTS, *ADJECTIVES, *NOUNS, *CITIES, "Question", "Answer", "User", "Assistant"):
        yield f"{word} {word} " * 20
    for _ in range(3000):
        problem = make_word_problem(rng, held_out=False)
        yield f"Question: {problem.question}\nAnswer: {problem.answer}\n"
        yield make_context(rng, len, 400).text


def make_tokenizer(seed: int) -> Tokenizer:
    """At most SIZE tokens; puts BOS in front of every text."""
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
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer
