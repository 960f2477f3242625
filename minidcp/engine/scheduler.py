"""Continuous batching in integers: decode rows first, then chunks of prompts within the token budget; the youngest
request is preempted when blocks run out. No tensors, no ranks, no text: `engine.py` turns what comes back into that."""

import heapq
from collections import deque
from dataclasses import dataclass, field

from minidcp.batch import Admission, StepPlan
from minidcp.kv_cache.block_manager import BlockManager
from minidcp.request import FinishReason, Request

MAX_SCORED = 256  # prompt tokens of a step whose log-probabilities are wanted: logits are large
GROWTH = 64  # tokens that every running request has room for when another is admitted, which it might else preempt soon


@dataclass
class PlannedStep:
    """A plan and whose rows it holds; the workers get the plan only."""

    plan: StepPlan = field(default_factory=StepPlan)
    requests: list[Request] = field(default_factory=list)


class Scheduler:
    """Plans steps ahead of their results: a request's next token may be sampled but not known yet. The caller plans
    step n + 1 while step n runs, and hands in n's tokens afterwards. That is safe because workers execute plans in
    order: whatever a late plan overwrites, earlier ones have read."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, budget: int, mixed_steps: bool = True) -> None:
        self.blocks, self.budget = blocks, budget  # tokens of a step
        self.mixed_steps, self.decoded_last = mixed_steps, False
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.free_slots = list(range(max_num_seqs))  # a heap: low slots first
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # of requests that came to run
        self.num_cached_tokens = 0  # that the prefix cache saved from being computed

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> PlannedStep | None:
        """The next step, or None if nothing can be planned before a running step's tokens are known."""
        step, turns = PlannedStep(), [self.add_decodes, self.add_prefills]
        if not self.mixed_steps and self.decoded_last:  # they take turns where there is both to do
            turns.reverse()
        for add in turns:
            if self.mixed_steps or not step.requests:
                add(step)
        self.decoded_last = step.plan.num_decode > 0
        return step if step.requests else None

    def add_decodes(self, step: PlannedStep) -> None:
        for request in list(self.running):
            if request.slot >= 0 and self.can_decode(request) and self.grow(request, step):
                self.add_row(step, request, 1)
        step.plan.num_decode = len(step.requests)

    def add_prefills(self, step: PlannedStep) -> None:
        budget = self.budget - step.plan.num_decode
        for request in self.running:
            if budget > 0 and request.is_prefilling and self.may_score(request, step):
                budget -= self.add_chunk(step, request, budget)
        while budget > 0 and self.waiting and self.admit(self.waiting[0], step):
            budget -= self.add_chunk(step, self.running[-1], budget)

    def may_score(self, request: Request, step: PlannedStep) -> bool:
        return request.params.prompt_logprobs is None or len(step.plan.scored) < MAX_SCORED

    def can_decode(self, request: Request) -> bool:
        """Its last token is sampled (known here or not), not computed yet, and may have a successor."""
        is_last_missing = request.num_computed == len(request.tokens) + request.num_in_flight - 1
        may_go_on = request.num_outputs + request.num_in_flight < request.max_tokens
        return is_last_missing and may_go_on and not request.is_prefilling

    def grow(self, request: Request, step: PlannedStep) -> bool:
        """Make room for one more token, preempting younger requests if need be; False: it was preempted."""
        if request.num_computed < len(request.blocks) * self.blocks.tokens_per_block:
            return True
        while (blocks := self.blocks.allocate(1)) is None:
            victim = self.running[-1]
            self.preempt(victim)
            if victim is request:
                return False
        self.hand_over(request, blocks, step)
        return True

    def hand_over(self, request: Request, blocks: list[int], step: PlannedStep) -> None:
        """Append blocks to the request's table, here and (through the plan) on every rank."""
        step.plan.new_blocks += [(request.slot, index, b) for index, b in enumerate(blocks, len(request.blocks))]
        request.blocks += blocks

    def admit(self, request: Request, step: PlannedStep) -> bool:
        """Move a waiting request to running, with blocks for all its known tokens and one more. Those of its longest
        cached beginning are shared; at least one token is always computed, and all whose logits are wanted."""
        if not self.free_slots or request.num_in_flight or not self.may_score(request, step):
            return False
        params, size = request.params, self.blocks.tokens_per_block
        usable = (len(request.tokens) - 1) // size if params.prompt_logprobs is None else 0
        if self.blocks.prefix_cache:
            self.blocks.hash_blocks(request.tokens, request.block_hashes, len(request.tokens))
        shared = self.blocks.share(request.block_hashes[:usable])
        count, most = len(request.tokens) // size + 1 - len(shared), GROWTH * len(self.running)
        growth = (min(GROWTH, r.max_tokens - r.num_outputs) for r in self.running)  # counted only where blocks are few
        fresh = self.blocks.allocate(count, most // size) or self.blocks.allocate(count, sum(growth) // size)
        if fresh is None:
            self.blocks.release(shared)
            return False
        self.waiting.popleft()
        request.slot = heapq.heappop(self.free_slots)
        request.num_computed = len(shared) * size
        request.prefill_end = len(request.tokens)
        request.num_published = len(shared)
        self.num_queried_tokens += len(request.tokens)
        self.num_cached_tokens += request.num_computed
        if not request.num_outputs:
            request.cached_tokens = request.num_computed
        self.hand_over(request, shared + fresh, step)
        num_prompt = len(request.prompt_token_ids)
        history = tuple(request.tokens) if params.is_penalised else ()
        step.plan.admitted.append(Admission(request.slot, params, request.seed, num_prompt, request.stop_ids, history))
        self.running.append(request)
        return True

    def add_chunk(self, step: PlannedStep, request: Request, budget: int) -> int:
        """Add as many of the request's missing tokens as the budget allows; returns how many."""
        start = request.num_computed
        length = min(budget, len(request.tokens) - start)
        if request.params.prompt_logprobs is not None:
            length = min(length, MAX_SCORED - len(step.plan.scored))
            scored = range(start + 1, min(start + length + 1, len(request.prompt_token_ids)))
            step.plan.scored += [(len(step.requests), start + length - p, request.tokens[p]) for p in scored]
        step.plan.tokens += request.tokens[start : start + length]
        self.add_row(step, request, length)
        return length

    def add_row(self, step: PlannedStep, request: Request, length: int) -> None:
        plan = step.plan
        plan.slots.append(request.slot)
        plan.starts.append(request.num_computed)
        plan.lengths.append(length)
        step.requests.append(request)
        request.num_computed += length
        if request.num_computed >= len(request.tokens):  # the row holds the last token: sample its successor
            plan.sampling.append(len(step.requests) - 1)
            request.num_in_flight += 1

    def update(self, step: PlannedStep, tokens: list[int]) -> list[Request]:
        """Hand in a step's sampled tokens; returns the requests that each of them belongs to, in order. A finished
        request is returned too (its token is one too many); the caller passes it over."""
        requests = [step.requests[row] for row in step.plan.sampling]
        for request, token in zip(requests, tokens, strict=True):
            request.num_in_flight -= 1
            if request.finish_reason is None:
                request.tokens.append(token)
        for request in step.requests:
            if request.slot >= 0:
                self.publish(request)
        return requests

    def publish(self, request: Request) -> None:
        """Offer the blocks that are full, computed and known to the prefix cache."""
        if not self.blocks.prefix_cache:
            return
        # A step still in flight may compute the last of them; no later plan can read it too early.
        size = self.blocks.tokens_per_block
        first, full = request.num_published, min(request.num_computed, len(request.tokens)) // size
        if full > first:
            self.blocks.hash_blocks(request.tokens, request.block_hashes, full * size)
            self.blocks.publish(request.blocks[first:full], request.block_hashes[first:full])
            request.num_published = full

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request in any state and give back what it holds."""
        if request.slot >= 0:
            self.leave(request)
        elif request.finish_reason is None:
            self.waiting.remove(request)
        request.finish_reason = reason

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it is computed anew, first in line, when there is room."""
        self.leave(request)
        request.num_computed = 0
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def leave(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.release(request.blocks)
        heapq.heappush(self.free_slots, request.slot)
        request.blocks, request.num_published, request.slot = [], 0, -1
