"""What the router believes every replica carries: its own sums, put right by what the replicas report.

A replica's report is true but old; the router's own sums are current but drift with every message that is lost. So each sum is

    value = what our requests add up to + correction,      correction = last report - what they added up to then

and news of a request that the report had counted already takes from the correction instead of counting twice. Of one sum:

    event                                      ours   correction   value
    start of a request of 100 tokens            100        0        100
    report: 130 tokens                          100       30        130
    progress: the request holds 120             120       10        130    the report had counted these 20
    finish, at 140 tokens in all                  0        0          0    10 more were counted, 10 are new; then all 140 go
"""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.cluster.balance import ReplicaLoad


class _Sum:
    """One number of one replica. Its value is never negative: a report is not, and `learn` takes no more than there is."""

    __slots__ = ("correction", "ours")

    def __init__(self) -> None:
        self.ours = 0
        self.correction = 0

    @property
    def value(self) -> int:
        return self.ours + self.correction

    def learn(self, change: int) -> None:
        """Requests of ours changed by this much; what a report had counted already comes out of the correction."""
        self.ours += change
        if change > 0 and self.correction > 0:
            self.correction -= min(change, self.correction)
        elif change < 0 and self.correction < 0:
            self.correction += min(-change, -self.correction)

    def settle(self, reported: int) -> None:
        """A report came: whatever was believed, this is the value now."""
        self.correction = reported - self.ours


@dataclass(slots=True)
class _Started:
    """A request on its replica, as last heard of."""

    ticket: int
    prompt: int  # tokens of the prompt
    expected: int  # tokens it was expected to generate
    computed: int = 0  # tokens of the prompt that are computed or cached
    generated: int = 0

    @property
    def running(self) -> int:
        return self.computed + self.generated


class _Replica:
    """One replica's sums and its requests in the order of their tickets."""

    def __init__(self, load: ReplicaLoad) -> None:
        self.load = load
        self.tickets = 0  # given out so far
        self.tickets_at_report = 0  # the same when the last report came
        self.started: dict[str, _Started] = {}
        self.clear()

    def clear(self) -> None:
        self.started.clear()
        self.waiting, self.running, self.requests = _Sum(), _Sum(), _Sum()
        self.to_come = 0  # expected tokens that are not generated yet: the router's guess alone, no report knows it
        self.publish()

    def publish(self) -> None:
        self.load.waiting_tokens = self.waiting.value
        self.load.running_tokens = self.running.value + self.to_come
        self.load.requests = self.requests.value

    def after(self, ticket: int) -> tuple[list[_Started], list[str]]:
        """What a report that had seen `ticket` did not count: requests on their way, and names of those that were lost."""
        sent, lost = [], []
        for request, one in reversed(self.started.items()):
            if one.ticket <= ticket:
                break
            if one.ticket > self.tickets_at_report:
                sent.append(one)
            else:
                lost.append(request)
        return sent, lost

    def update(self, one: _Started, computed: int, generated: int) -> None:
        """Totals of a request so far. Totals only grow: an old message changes nothing."""
        computed, generated = min(max(computed, one.computed), one.prompt), max(generated, one.generated)
        self.waiting.learn(one.computed - computed)
        self.running.learn(computed + generated - one.running)
        self.to_come -= min(generated, one.expected) - min(one.generated, one.expected)
        one.computed, one.generated = computed, generated

    def remove(self, request: str) -> None:
        one = self.started.pop(request)
        self.waiting.learn(one.computed - one.prompt)
        self.running.learn(-one.running)
        self.requests.learn(-1)
        self.to_come -= max(0, one.expected - one.generated)


class LoadBook:
    """The router's counters. `loads` is what the policies read, and only this class writes it.

    Any message may be lost: `progress` and `finish` carry totals, so that the next makes up for the last, and `reconcile`
    replaces what the counters have come to. News of a request the book does not know is ignored: a report may have ended it.
    """

    def __init__(self, replicas: int) -> None:
        """All replicas routable and idle. Raises ValueError if `replicas` is below 1."""
        if replicas < 1:
            raise ValueError(f"replicas={replicas} must be at least 1. Give the number of data-parallel replicas.")
        self.loads = [ReplicaLoad(i) for i in range(replicas)]
        self._replicas = [_Replica(load) for load in self.loads]
        self._at: dict[str, _Replica] = {}  # by request

    def __len__(self) -> int:
        """Requests that are believed to be unfinished."""
        return len(self._at)

    def start(self, request: str, replica: int, prompt_tokens: int, expected_tokens: int = 0, cached_tokens: int = 0) -> int:
        """A request was sent to a replica, where its prompt waits to be computed.

        `expected_tokens` are expected to be generated, and count as running from now on. `cached_tokens` of the prompt are
        believed to be cached there: to be held, not computed. Returns the request's ticket (1, 2, ... per replica), which
        travels with it: see `reconcile`. Raises ValueError for a request that is in the book, or impossible numbers.
        """
        if request in self._at:
            raise ValueError(f"request {request!r} was started already and has not finished. Finish it first, or use another id.")
        if not (0 <= cached_tokens <= prompt_tokens and expected_tokens >= 0):
            numbers = f"prompt_tokens={prompt_tokens}, cached_tokens={cached_tokens}, expected_tokens={expected_tokens}"
            raise ValueError(f"{numbers}: none may be negative, nor more cached than the prompt has. Count them again.")
        there = self._replicas[replica]
        there.tickets += 1
        there.started[request] = _Started(there.tickets, prompt_tokens, expected_tokens, cached_tokens)
        self._at[request] = there
        there.waiting.ours += prompt_tokens - cached_tokens
        there.running.ours += cached_tokens
        there.requests.ours += 1
        there.to_come += expected_tokens
        there.publish()
        return there.tickets

    def progress(self, request: str, computed_tokens: int, generated_tokens: int) -> None:
        """Totals so far: prompt tokens computed or found cached, and tokens generated."""
        there = self._at.get(request)
        if there is not None:
            there.update(there.started[request], computed_tokens, generated_tokens)
            there.publish()

    def finish(self, request: str, generated_tokens: int | None = None) -> None:
        """The request ended, for whatever reason, after that many tokens (None: not known, as when it was aborted)."""
        there = self._at.pop(request, None)
        if there is not None:
            one = there.started[request]
            if generated_tokens is not None:
                there.update(one, one.prompt, generated_tokens)
            there.remove(request)
            there.publish()

    def reconcile(
        self, replica: int, waiting_tokens: int, running_tokens: int, requests: int | None = None, newest_ticket: int | None = None
    ) -> None:
        """A replica reported what it carries: prompt tokens to compute, tokens held, unfinished requests (None: it did not say).

        `newest_ticket` is the newest the replica had seen: what was sent to it after that is still on its way, and is added to
        the report, but only once: what the next report does not count either was lost (a round trip is shorter than the time
        between reports). Without a ticket, the report is taken to count everything. When the replica has fewer requests than the
        book, the end of the oldest was lost, and they are dropped (perhaps another's was: the sums are right all the same).
        Raises ValueError for negative numbers.
        """
        if min(waiting_tokens, running_tokens, requests or 0) < 0:
            numbers = f"waiting_tokens={waiting_tokens}, running_tokens={running_tokens}, requests={requests}"
            raise ValueError(f"replica {replica} reported {numbers}: all must be 0 or more. Its counters are wrong: restart it.")
        there = self._replicas[replica]
        sent, lost = there.after(there.tickets if newest_ticket is None else newest_ticket)
        self._drop(there, lost)
        if requests is not None:
            surplus = len(there.started) - len(sent) - requests
            self._drop(there, list(there.started)[: max(0, surplus)])
            there.requests.settle(requests + len(sent))
        there.waiting.settle(waiting_tokens + sum(one.prompt - one.computed for one in sent))
        there.running.settle(running_tokens + sum(one.running for one in sent))
        there.tickets_at_report = there.tickets
        there.publish()

    def set_routable(self, replica: int, routable: bool) -> None:
        """Whether new requests may go there. What it carries stays in the book: a draining replica still works."""
        self.loads[replica].routable = routable

    def give_up(self, replica: int) -> None:
        """The replica takes no requests any more, for good."""
        self.loads[replica].routable, self.loads[replica].given_up = False, True

    def forget(self, replica: int) -> None:
        """The replica died or started anew: it carries nothing. Its requests are unknown from now on; tickets count on."""
        for request in self._replicas[replica].started:
            del self._at[request]
        self._replicas[replica].clear()

    def _drop(self, there: _Replica, requests: list[str]) -> None:
        for request in requests:
            there.remove(request)
            del self._at[request]
