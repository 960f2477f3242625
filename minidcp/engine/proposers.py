"""Where drafts come from. `PromptLookup` finds them in a request's own text: where its last few
tokens occurred before, what came after them may come again. `Predictions` are made by the ranks
themselves, with the model's MTP layer (`worker/predictor.py`). Next: `drafter.py`."""

from typing import Protocol

from minidcp.request import Request

TOKENS_INDEXED = 4096  # in one step at most, so that no step waits for long prompts


class Proposer(Protocol):
    """Proposes tokens that may follow the next token of a request, known yet or not.

    Attributes:
        num_predicted: how many drafts the ranks must make behind each sampled token.
    """

    num_predicted: int

    def begin_step(self) -> None:
        """The next step is being planned."""

    def propose(self, request: Request, count: int) -> list[int]:
        """Up to `count` drafts, as StepPlan.drafts has them."""

    def guess(self, request: Request) -> int | None:
        """The first token that is not known yet, as far as the driver can guess it."""

    def drop(self, request: Request) -> None:
        """The request has ended."""


class Predictions:
    """Drafts that the ranks make, `num_predicted` behind every token that they sample. Their values
    stay there."""

    def __init__(self, num_predicted: int) -> None:
        self.num_predicted = num_predicted

    def begin_step(self) -> None:
        pass

    def propose(self, request: Request, count: int) -> list[int]:
        return [-2 - place for place in range(min(count, self.num_predicted))]

    def guess(self, request: Request) -> int | None:
        return None

    def drop(self, request: Request) -> None:
        pass


class NgramIndex:
    """Where each n-gram of a growing text was last continued.

    Each token costs a look-up for each n, however long the text is.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self.lengths = range(longest, shortest - 1, -1)
        self.continuations: dict[tuple[int, ...], int] = {}  # n-gram: where the next token is
        self.num_indexed = 0

    def extend(self, tokens: list[int], most: int = TOKENS_INDEXED) -> int:
        """Index the tokens that are new, `most` at most; returns how many."""
        begin = self.num_indexed
        end = min(len(tokens), begin + most)
        for position in range(begin, end):
            for length in self.lengths:
                if length <= position:
                    self.continuations[tuple(tokens[position - length : position])] = position
        self.num_indexed = end
        return end - begin

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow: those behind the longest n-gram that occurred."""
        if self.num_indexed < len(tokens):
            return []  # a long prompt, of which the rest is still to be indexed
        for length in self.lengths:
            if length > len(tokens):
                continue
            position = self.continuations.get(tuple(tokens[len(tokens) - length :]))
            if position is not None:
                return repeat_from(tokens, position, count)
        return []


def repeat_from(tokens: list[int], position: int, count: int) -> list[int]:
    """`count` tokens from a position on, going on in a circle where the text ends."""
    period = len(tokens) - position
    return [tokens[position + i % period] for i in range(count)]


class PromptLookup:
    """An index for each request, of n-grams from `shortest` to `longest` tokens."""

    num_predicted = 0

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self.indices: dict[str, NgramIndex] = {}  # by request id
        self.tokens_to_index = TOKENS_INDEXED  # that this step has left

    def begin_step(self) -> None:
        self.tokens_to_index = TOKENS_INDEXED

    def propose(self, request: Request, count: int) -> list[int]:
        index = self.indices.get(request.request_id)
        if index is None:
            index = NgramIndex(self.shortest, self.longest)
            self.indices[request.request_id] = index
        self.tokens_to_index -= index.extend(request.tokens, self.tokens_to_index)
        if count <= 0:
            return []
        num_unknown = request.num_in_flight
        return index.propose(request.tokens, num_unknown + count)[num_unknown:]

    def guess(self, request: Request) -> int | None:
        index = self.indices.get(request.request_id)
        first = [] if index is None else index.propose(request.tokens, 1)
        return first[0] if first else None

    def drop(self, request: Request) -> None:
        self.indices.pop(request.request_id, None)
