"""Which waiting request is next: groups take turns, and nobody waits for a whole batch."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from minidcp import SamplingParams, StructuredOutputsParams
from minidcp.engine.scheduler import Scheduler
from minidcp.engine.waiting_queue import WaitingQueue
from minidcp.kv_cache.block_manager import BlockManager
from minidcp.request import FinishReason, Request

REGEX = StructuredOutputsParams(regex="a")


def make_request(number: int, group: str, max_tokens: int = 1) -> Request:
    return Request(str(number), [5, 6, 7], SamplingParams(), max_tokens, seed=0, group=group)


def test_a_preempted_request_without_a_mask_lets_others_go_first() -> None:
    waits = Request("p", [5], SamplingParams(structured_outputs=REGEX), 9, seed=0)
    other = make_request(1, "a")
    queue = WaitingQueue()
    queue.put_first(waits)
    assert queue.first is waits  # there is no other
    queue.add(other)
    assert queue.first is other
    waits.mask = b"\x01"
    assert queue.first is waits
    waits.mask = None
    assert queue.pop_first() is other
    assert queue.pop_first() is waits
    assert len(queue) == 0


class Model:
    """The same by brute force. Of the groups that wait, the next is the one whose last turn, or
    whose arrival, is the longest ago."""

    def __init__(self) -> None:
        self.preempted: list[Request] = []
        self.waiting: list[Request] = []  # in the order of their arrival
        self.since: dict[str, int] = {}  # by group: its last turn or its arrival
        self.now = 0

    def add(self, request: Request) -> None:
        self.now += 1
        if all(other.group != request.group for other in self.waiting):
            self.since[request.group] = self.now
        self.waiting.append(request)

    def put_first(self, request: Request) -> None:
        self.preempted.insert(0, request)

    def first(self) -> Request:
        if self.preempted:
            return self.preempted[0]
        return min(self.waiting, key=lambda request: self.since[request.group])

    def pop_first(self) -> Request:
        request = self.first()
        if request not in self.preempted:
            self.now += 1
            self.since[request.group] = self.now
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        where = self.preempted if request in self.preempted else self.waiting
        where.remove(request)


@settings(deadline=None)
@given(st.data())
def test_the_waiting_queue_against_a_model(data: st.DataObject) -> None:
    queue, model = WaitingQueue(), Model()
    outside: list[Request] = []
    for number in range(data.draw(st.integers(1, 60))):
        actions = ["add", "add"]
        if len(queue):
            actions += ["pop", "pop", "remove"]
        if outside:
            actions.append("preempt")
        match data.draw(st.sampled_from(actions)):
            case "add":
                request = make_request(number, data.draw(st.sampled_from("abcd")))
                queue.add(request)
                model.add(request)
            case "pop":
                request = queue.pop_first()
                assert request is model.pop_first()
                outside.append(request)
            case "remove":
                request = data.draw(st.sampled_from(model.waiting + model.preempted))
                queue.remove(request)
                model.remove(request)
            case "preempt":
                request = outside.pop()
                queue.put_first(request)
                model.put_first(request)

        assert len(queue) == len(model.waiting) + len(model.preempted)
        if len(queue):
            assert queue.first is model.first()
    assert set(queue.groups) == {request.group for request in model.waiting}


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 40))
def test_a_single_prompt_waits_for_one_of_each_group(sizes: list[int], num_served: int) -> None:
    """However large the groups are that came before, and however far they have got."""
    queue = WaitingQueue()
    for group, size in enumerate(sizes):
        for number in range(size):
            queue.add(make_request(number, f"batch {group}"))
    for _ in range(min(num_served, len(queue))):
        queue.pop_first()
    num_groups = len(queue.groups)
    alone = make_request(0, "alone")
    queue.add(alone)

    before = []
    while (request := queue.pop_first()) is not alone:
        before.append(request.group)
    assert len(before) == num_groups == len(set(before))


def test_one_group_is_served_first_come_first() -> None:
    """What a single client sees, and who calls the engine without groups: the order of arrival."""
    queue = WaitingQueue()
    requests = [make_request(i, "") for i in range(50)]
    for request in requests:
        queue.add(request)
    assert [queue.pop_first() for _ in requests] == requests


def test_one_prompt_beside_a_batch_of_thousands() -> None:
    """It takes the next place that gets free, and its turn comes before most of the batch."""
    scheduler = Scheduler(BlockManager(200, 16), max_num_seqs=8, budget=64)
    batch = [make_request(i, "batch", max_tokens=4) for i in range(4352)]
    for request in batch:
        scheduler.add(request)
    alone = make_request(0, "alone", max_tokens=4)
    num_steps = 0
    while alone.finish_reason is None:
        if num_steps == 3:
            scheduler.add(alone)
        step = scheduler.schedule()
        assert step is not None
        num_steps += 1
        for request, *_ in scheduler.update(step, [9] * len(step.plan.sampling)):
            if request.num_outputs == request.max_tokens:
                scheduler.finish(request, FinishReason.LENGTH)
    assert sum(request.finish_reason is not None for request in batch) <= 2 * 8
    assert num_steps <= 12
    assert len(scheduler.waiting) > 4300

    for request in batch:  # a client that leaves takes all its requests back, wherever they are
        if request.finish_reason is None:
            scheduler.finish(request, FinishReason.ABORT)
    assert len(scheduler.waiting) == 0 and not scheduler.waiting.groups
    assert not scheduler.running and not scheduler.blocks.live
