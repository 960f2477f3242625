"""Continuous batching in integers: decode rows first, then prompt chunks within the token budget of
a step. The youngest request is preempted when blocks run out. Text is in `engine.py`, ranks are in
`executor.py`, tensors in `worker/`. Next: `executor.py`."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from minidcp.batch import MAX_SCORED_TOKENS, Admission, ScoredToken, StepPlan
from minidcp.engine.drafter import Drafter, count_accepted
from minidcp.engine.waiting_queue import WaitingQueue
from minidcp.kv_cache.block_manager import BlockManager
from minidcp.request import FinishReason, NewTokens, Request

# A request is admitted only if there is room for about this many more tokens of every running
# request. Otherwise it might be preempted soon after, and its prompt would be computed twice.
GROWTH = 64


@dataclass
class ScheduledStep:
    """A plan and the requests behind it. The workers get only the plan."""

    plan: StepPlan = field(default_factory=StepPlan)
    requests: list[Request] = field(default_factory=list)  # of the plan's rows, in order
    admitted: list[Request] = field(default_factory=list)  # those that start running in this step


class Scheduler:
    """Plans steps before the results of earlier steps are known.

    The caller plans step n + 1 while step n runs, and hands in the tokens of step n afterwards. So
    the next token of a request may be sampled, or about to be, and still unknown here. This is safe
    because workers execute plans in order: when a later plan overwrites something, the earlier
    plans have already read it. Only behind drafts it waits: how many of them count must be known.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        budget: int,
        mixed_steps: bool = True,
        drafter: Drafter | None = None,
    ) -> None:
        self.blocks = blocks
        self.drafter = drafter
        self.num_predicted = 0 if drafter is None else drafter.proposer.num_predicted
        self.num_drafts_in_flight = 0
        self.budget = budget  # tokens of a step at most
        self.mixed_steps = mixed_steps  # whether a step may hold both decode rows and prompt chunks
        self.decoded_last = False

        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # oldest first
        self.free_slots = list(range(max_num_seqs))  # a heap: low slots first

        self.num_preemptions = 0
        self.num_queried_tokens = 0  # looked up in the prefix cache, at every admission
        self.num_cached_tokens = 0  # found there, and so not computed

    def add(self, request: Request) -> None:
        self.waiting.add(request)

    def schedule(self) -> ScheduledStep | None:
        """The next step. None: nothing can be planned before a running step's tokens are known."""
        if self.num_drafts_in_flight > 0:
            return None
        step = ScheduledStep()
        if self.mixed_steps:
            self.add_decodes(step)
            self.add_prefills(step)
        elif self.decoded_last:  # decodes and prefills take turns where both are waiting
            self.add_prefills(step)
            if not step.requests:
                self.add_decodes(step)
        else:
            self.add_decodes(step)
            if not step.requests:
                self.add_prefills(step)

        self.decoded_last = step.plan.num_decode > 0
        self.num_drafts_in_flight += len(step.plan.drafts)
        return step if step.requests else None

    def add_decodes(self, step: ScheduledStep) -> None:
        decoding = [request for request in self.running if self.can_decode(request)]
        proposals = {}
        if self.drafter is not None:
            proposals = self.drafter.propose(decoding)
        ready = []
        for request in decoding:
            if request.slot >= 0 and self.make_room(request, step):  # else it was preempted here
                ready.append(request)
        for request in ready:  # only now, so that drafts get no block that another token needs
            drafts = proposals.get(request.request_id, [])
            drafts = drafts[: self.make_room_for_drafts(request, len(drafts), step)]
            self.add_row(step, request, 1, drafts)
            self.make_room_to_predict(request, step)
        step.plan.num_decode = len(step.requests)

    def add_prefills(self, step: ScheduledStep) -> None:
        """Go on with the prompts of running requests, then admit waiting ones in their order."""
        budget = self.budget - step.plan.num_decode_tokens
        for request in self.running:
            if budget > 0 and request.is_prefilling and self.may_score(request, step):
                budget -= self.add_chunk(step, request, budget)

        while budget > 0 and self.waiting and self.admit(self.waiting.first, step):
            budget -= self.add_chunk(step, self.running[-1], budget)

    def can_decode(self, request: Request) -> bool:
        """Whether only its last token is not computed yet, and another may follow that token."""
        if request.is_prefilling or request.lacks_mask:
            return False
        num_tokens = len(request.tokens) + request.num_in_flight
        num_outputs = request.num_outputs + request.num_in_flight
        return request.num_computed == num_tokens - 1 and num_outputs < request.max_tokens

    def may_score(self, request: Request, step: ScheduledStep) -> bool:
        """Whether the step has room for log-probabilities of the prompt, if they are wanted."""
        is_scored = request.params.prompt_logprobs is not None
        return not is_scored or len(step.plan.scored) < MAX_SCORED_TOKENS

    def make_room(self, request: Request, step: ScheduledStep) -> bool:
        """Make room for one more token, by preempting younger requests if necessary.

        Returns False if the request itself was preempted because no younger one was left.
        """
        if request.num_computed < len(request.blocks) * self.blocks.tokens_per_block:
            return True

        for other in self.running if self.blocks.num_available == 0 else ():
            self.give_back_room(other)
        blocks = self.blocks.allocate(1)
        while blocks is None:
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is request:
                return False
            blocks = self.blocks.allocate(1)

        self.append_blocks(request, blocks, step)
        return True

    def make_room_for_drafts(self, request: Request, count: int, step: ScheduledStep) -> int:
        """Make room behind the next token, as far as blocks are free; returns for how many tokens.

        Nobody is preempted for drafts.
        """
        room = len(request.blocks) * self.blocks.tokens_per_block - request.num_computed - 1
        if room < count:
            num_blocks = -(-(count - room) // self.blocks.tokens_per_block)
            blocks = self.blocks.allocate(num_blocks)
            if blocks is None:
                return room
            self.append_blocks(request, blocks, step)
        return count

    def make_room_to_predict(self, request: Request, step: ScheduledStep) -> None:
        """Tell the ranks how much room there is behind a row that samples, where they make drafts.

        They store what they compute from all their drafts but the last. They can do with less.
        """
        if self.num_predicted == 0:
            return
        most = len(request.prompt_token_ids) + request.max_tokens
        end = min(most, request.num_computed + self.num_predicted - 1)
        self.make_room_for_drafts(request, end - request.num_computed - 1, step)
        step.plan.room.append(len(request.blocks) * self.blocks.tokens_per_block)

    def give_back_room(self, request: Request) -> None:
        """Give back the blocks that were taken for drafts alone, not that of the next token."""
        known = max(request.num_computed, request.prefill_end)
        num_needed = known // self.blocks.tokens_per_block + 1
        self.blocks.release(request.blocks[num_needed:])
        del request.blocks[num_needed:]

    def append_blocks(self, request: Request, blocks: list[int], step: ScheduledStep) -> None:
        """Append blocks to the request's table, here and (through the plan) on every rank."""
        for index, block in enumerate(blocks, start=len(request.blocks)):
            step.plan.new_blocks.append((request.slot, index, block))
        request.blocks += blocks

    def admit(self, request: Request, step: ScheduledStep) -> bool:
        """Start running the first waiting request if there is a slot and enough room.

        It gets blocks for all its known tokens and one more.
        """
        if not self.free_slots or not self.may_score(request, step):
            return False
        if request.num_in_flight > 0:  # a token that was sampled before its preemption
            return False
        if request.lacks_mask:  # it was preempted, and its last token is still being looked at
            return False

        shared = self.share_cached_blocks(request)
        num_blocks = len(request.tokens) // self.blocks.tokens_per_block + 1
        num_new_blocks = num_blocks - len(shared)
        if not self.has_room_to_grow(num_new_blocks):
            self.blocks.release(shared)
            return False
        new = self.blocks.allocate(num_new_blocks)
        assert new is not None

        self.waiting.pop_first()
        self.start_running(request, len(shared))
        self.append_blocks(request, shared + new, step)
        step.admitted.append(request)
        step.plan.admitted.append(Admission.describe(request))
        return True

    def share_cached_blocks(self, request: Request) -> list[int]:
        """Take a reference to the blocks of the longest known prefix that the request can use.

        Their content may be computed by this very step, for a request that was admitted before.
        """
        if not self.blocks.prefix_cache:
            return []
        self.hash_blocks(request, len(request.tokens))

        if request.params.prompt_logprobs is not None:
            return []  # the logits of all its tokens are wanted
        # At least one token must be computed, to get the logits of the next one.
        num_usable = (len(request.tokens) - 1) // self.blocks.tokens_per_block
        return self.blocks.share(request.block_hashes[:num_usable])

    def has_room_to_grow(self, num_new_blocks: int) -> bool:
        """Whether there are that many blocks, and room for about GROWTH tokens per running request.

        A request that will end sooner needs less. Blocks are not rounded up for each request.
        """
        num_spare = self.blocks.num_available - num_new_blocks
        tokens_per_block = self.blocks.tokens_per_block

        # Mostly this bound suffices, and it costs nothing. The sum goes over all running requests.
        if GROWTH * len(self.running) // tokens_per_block <= num_spare:
            return True
        growth = sum(min(GROWTH, r.max_tokens - r.num_outputs) for r in self.running)
        return growth // tokens_per_block <= num_spare

    def start_running(self, request: Request, num_shared_blocks: int) -> None:
        num_cached_tokens = num_shared_blocks * self.blocks.tokens_per_block
        request.slot = heapq.heappop(self.free_slots)
        request.num_computed = num_cached_tokens
        request.prefill_end = len(request.tokens)
        request.num_published = num_shared_blocks
        self.running.append(request)

        self.num_queried_tokens += len(request.tokens)
        self.num_cached_tokens += num_cached_tokens
        if request.num_outputs == 0:
            request.cached_tokens = num_cached_tokens

    def add_chunk(self, step: ScheduledStep, request: Request, budget: int) -> int:
        """Add as many of the request's missing tokens as the budget allows; returns how many."""
        start = request.num_computed
        length = min(budget, len(request.tokens) - start)
        if request.params.prompt_logprobs is not None:
            length = min(length, MAX_SCORED_TOKENS - len(step.plan.scored))
            self.add_scored_tokens(step, request, length)

        end = start + length
        is_last = end == len(request.tokens)
        step.plan.tokens += request.tokens[start:end]
        self.add_row(step, request, length)
        if self.num_predicted > 0:
            step.plan.followers.append(-1 if is_last else request.tokens[end])
        if is_last:
            self.make_room_to_predict(request, step)
        # Now, so that equal prompts that arrived together are computed once: the next ones that are
        # admitted share these blocks.
        self.publish(request)
        return length

    def add_scored_tokens(self, step: ScheduledStep, request: Request, length: int) -> None:
        """Ask for the log-probabilities of the prompt tokens that follow this chunk's tokens."""
        row = len(step.requests)  # the one that the chunk is about to get
        start = request.num_computed
        end = start + length
        last = min(end, len(request.prompt_token_ids) - 1)
        for position in range(start + 1, last + 1):
            tokens_before_last = end - position  # counted from the token before `position`
            step.plan.scored.append(ScoredToken(row, tokens_before_last, request.tokens[position]))

    def add_row(
        self, step: ScheduledStep, request: Request, length: int, drafts: Sequence[int] = ()
    ) -> None:
        """Add a row for the request's next `length` tokens, and drafts behind them."""
        step.plan.slots.append(request.slot)
        step.plan.starts.append(request.num_computed)
        step.plan.lengths.append(length + len(drafts))
        step.plan.drafts += drafts
        step.requests.append(request)
        request.num_computed += length + len(drafts)

        if request.num_computed >= len(request.tokens):  # with its last token: sample the next one
            if request.mask is not None:
                step.plan.masks[len(step.plan.sampling)] = request.mask
                request.mask = None
            step.plan.sampling += [len(step.requests) - 1] * (1 + len(drafts))
            request.num_in_flight += 1

    def update(
        self, step: ScheduledStep, tokens: list[int], all_drafts: list[int] | None = None
    ) -> list[NewTokens]:
        """Hand in the tokens that a step sampled. Returns which of them each request gets.

        `all_drafts` are those that the step checked, where the ranks had made them.
        A request may have finished while the step ran. It is returned too, but the tokens are too
        many, and the caller must skip them.
        """
        all_drafts = step.plan.drafts if all_drafts is None else all_drafts
        results = []
        first = 0
        num_drafts_before = 0
        for row in dict.fromkeys(step.plan.sampling):
            request = step.requests[row]
            num_drafts = 0
            if row < step.plan.num_decode:
                num_drafts = step.plan.lengths[row] - 1
            drafts = all_drafts[num_drafts_before : num_drafts_before + num_drafts]
            num_accepted = count_accepted(tokens[first : first + num_drafts], drafts)
            self.take_tokens(request, tokens[first : first + 1 + num_accepted], num_drafts)
            results.append(NewTokens(request, first, first + 1 + num_accepted, num_drafts))
            first += 1 + num_drafts
            num_drafts_before += num_drafts
        assert first == len(tokens)
        self.num_drafts_in_flight -= len(step.plan.drafts)

        for request in step.requests:
            if request.slot >= 0:
                self.publish(request)
        return results

    def take_tokens(self, request: Request, tokens: list[int], num_drafts: int) -> None:
        """Append the tokens that count. What was computed for other drafts is as if it were not."""
        request.num_in_flight -= 1
        if request.finish_reason is not None:
            return
        request.tokens += tokens
        num_accepted = len(tokens) - 1
        if self.drafter is not None:
            self.drafter.note(request, num_drafts, num_accepted)
        if request.slot >= 0 and num_drafts > num_accepted:
            request.num_computed -= num_drafts - num_accepted
            self.give_back_room(request)

    def publish(self, request: Request) -> None:
        """Offer its blocks that are full of known tokens to the prefix cache.

        A block counts as full when the step that fills it is planned. Nobody can read it too early.
        Later plans are executed later. Rows of the same plan may read it, too: in each layer the
        latents of all prompt chunks are stored before any of them looks into the cache. A planned
        step is executed, even if all its requests end before, or else the engine has ended.
        """
        if not self.blocks.prefix_cache:
            return

        tokens_per_block = self.blocks.tokens_per_block
        num_known_computed = min(request.num_computed, len(request.tokens))
        num_full = num_known_computed // tokens_per_block
        if num_full <= request.num_published:
            return

        self.hash_blocks(request, num_full * tokens_per_block)
        new = slice(request.num_published, num_full)
        self.blocks.publish(request.blocks[new], request.block_hashes[new])
        request.num_published = num_full

    def hash_blocks(self, request: Request, num_tokens: int) -> None:
        """Hash the full blocks of its first tokens, those that have no hash yet."""
        salt = request.params.cache_salt
        self.blocks.hash_blocks(request.tokens, request.block_hashes, num_tokens, salt)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request in any state and give back what it holds."""
        if self.drafter is not None:
            self.drafter.drop(request)
        if request.slot >= 0:
            self.stop_running(request)
        elif request.finish_reason is None:
            self.waiting.remove(request)
        request.finish_reason = reason

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks away. It is first in line to be computed again."""
        self.stop_running(request)
        request.num_computed = 0
        self.num_preemptions += 1
        self.waiting.put_first(request)

    def stop_running(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.release(request.blocks)
        request.blocks = []
        request.num_published = 0
        heapq.heappush(self.free_slots, request.slot)
        request.slot = -1
