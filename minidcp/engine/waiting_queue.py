"""The requests that wait to be admitted, and whose turn it is. Whether there is room for the next
one is decided in `scheduler.py`."""

from collections import OrderedDict

from minidcp.request import Request


class WaitingQueue:
    """Waiting requests, in the order in which they are admitted.

    A group is what one client sent at once. Groups take turns: after one of its requests is
    admitted, a group goes to the end of the line. So a client with one prompt waits for one prompt
    of each group before it, not for a whole batch. Within a group the oldest request comes first.
    Preempted requests come before all others, the one that was preempted last first. One whose mask
    is not known yet lets others go before it.
    """

    def __init__(self) -> None:
        self.preempted: OrderedDict[Request, None] = OrderedDict()
        self.groups: OrderedDict[str, OrderedDict[Request, None]] = OrderedDict()
        self.num_grouped = 0  # requests in `groups`; other threads may ask for the length

    def __len__(self) -> int:
        return len(self.preempted) + self.num_grouped

    def add(self, request: Request) -> None:
        """Let a request wait behind those of its group."""
        group = self.groups.setdefault(request.group, OrderedDict())
        group[request] = None
        self.num_grouped += 1

    def put_first(self, request: Request) -> None:
        """Let a preempted request wait before all others."""
        self.preempted[request] = None
        self.preempted.move_to_end(request, last=False)

    @property
    def first(self) -> Request:
        """The request whose turn it is. There must be one."""
        for request in self.preempted:
            if not request.lacks_mask:
                return request
        if not self.groups:
            return next(iter(self.preempted))
        group = next(iter(self.groups.values()))
        return next(iter(group))

    def pop_first(self) -> Request:
        """Take out the request whose turn it is; then it is the next group's turn."""
        request = self.first
        was_preempted = request in self.preempted
        self.remove(request)
        if not was_preempted and request.group in self.groups:
            self.groups.move_to_end(request.group)
        return request

    def remove(self, request: Request) -> None:
        """Take out any waiting request. The turns of the groups stay as they are."""
        if request in self.preempted:
            del self.preempted[request]
            return

        group = self.groups[request.group]
        del group[request]
        self.num_grouped -= 1
        if not group:
            del self.groups[request.group]
