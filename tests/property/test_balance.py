"""Routing for any loads: always a routable replica, within the bound; the books against a replica that counts for itself."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lockstep.cluster.balance import ReplicaLoad, explicit, prefix_affine, round_robin, shortest_queue, sticky
from lockstep.cluster.load_book import LoadBook
from lockstep.cluster.prefix_index import PrefixIndex

tokens = st.integers(0, 20_000)
bounds = st.sampled_from([0.0, 0.05, 0.25, 2.0])
slacks = st.sampled_from([0, 1, 1000])


@st.composite
def replica_loads(draw: st.DrawFn) -> list[ReplicaLoad]:
    """1 to 9 replicas, at least one of them routable."""
    count = draw(st.integers(1, 9))
    found = [ReplicaLoad(i, draw(st.booleans()), draw(tokens), draw(tokens), draw(st.integers(0, 3))) for i in range(count)]
    found[draw(st.integers(0, count - 1))].routable = True
    return found


@given(replica_loads(), st.data(), bounds, slacks, st.integers(0, 20), st.text(max_size=5))
@settings(max_examples=300)
def test_a_routable_replica_within_the_bound(loads, data, bound, slack, start, session):
    matches = data.draw(st.lists(st.sampled_from([0, 16, 32]), min_size=len(loads), max_size=len(loads)))
    able = [load for load in loads if load.routable]
    before = [load.tokens for load in loads]
    least = min(load.tokens for load in able)
    limit = least + max(bound * sum(load.tokens for load in able) / len(able), slack)
    assert loads[round_robin(loads, start)].routable
    assert loads[shortest_queue(loads, start=start)] in [load for load in able if load.tokens == least]
    affine = loads[prefix_affine(loads, matches, bound, slack, start=start)]
    stuck = loads[sticky(session, loads, bound, slack)]
    for chosen in (affine, stuck):
        assert chosen.routable and chosen.tokens <= limit
    # no replica within the bound matches more, or as much with less load
    assert all((matches[x.replica], -x.tokens) <= (matches[affine.replica], -affine.tokens) for x in able if x.tokens <= limit)
    assert explicit(affine.replica, loads) == affine.replica
    assert before == [load.tokens for load in loads]


@given(st.integers(2, 12), st.data())
@settings(max_examples=100)
def test_a_dead_replica_moves_only_its_own_sessions(count, data):
    loads = [ReplicaLoad(i) for i in range(count)]
    dead = data.draw(st.integers(0, count - 1))
    sessions = data.draw(st.lists(st.text(max_size=8), min_size=1, max_size=40))
    before = {session: sticky(session, loads) for session in sessions}
    loads[dead].routable = False
    after = {session: sticky(session, loads) for session in sessions}
    assert all(after[s] != dead if before[s] == dead else after[s] == before[s] for s in sessions)
    more = [ReplicaLoad(i) for i in range(count + 1)]  # a new one takes sessions, and moves none between the others
    assert all(sticky(s, more) in (before[s], count) for s in sessions)


def test_sessions_spread_evenly():
    loads = [ReplicaLoad(i) for i in range(8)]
    counts = [0] * 8
    for i in range(8000):
        counts[sticky(f"user-{i}", loads)] += 1
    assert min(counts) > 850 and max(counts) < 1150  # 5 standard deviations of a fair draw


prompts = st.lists(st.integers(0, 1), max_size=9)
events = st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), prompts)), max_size=25)


@given(events, prompts, st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=300)
def test_prefix_index_equals_brute_force(history, prompt, block_size, max_blocks):
    index, oracle = PrefixIndex(3, block_size, max_blocks=max_blocks), [set() for _ in range(3)]

    def prefixes(ids: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids[: n * block_size]) for n in range(1, min(len(ids) // block_size, max_blocks) + 1)]

    for replica, inserted in history:
        if inserted is None:
            index.forget(replica)
            oracle[replica].clear()
        else:
            index.insert(inserted, replica)
            oracle[replica].update(prefixes(inserted))
    assert index.matches(prompt) == index.matches(prompt, index.names(prompt))
    assert index.matches(prompt) == [max((len(p) for p in prefixes(prompt) if p in held), default=0) for held in oracle]


@given(st.lists(st.tuples(st.integers(0, 1), prompts), max_size=60), st.integers(1, 6))
@settings(max_examples=200)
def test_prefix_index_is_bounded_and_keeps_the_recent(history, blocks):
    index = PrefixIndex(2, 1, blocks_per_replica=blocks, max_blocks=4)
    for replica, inserted in history:
        index.insert(inserted, replica)
        assert len(index) <= 2 * (index.generation_uses + 3)
        assert index.matches(inserted)[replica] == min(len(inserted), 4)


class BookAndReplica(RuleBasedStateMachine):
    """A replica that knows itself, a book that hears of it late, in part, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.book = LoadBook(1)
        self.names = 0
        self.wire: list[tuple[str, int, int]] = []  # sent, not yet there: name, ticket, prompt
        self.there: dict[str, list[int]] = {}  # on the replica: prompt, computed, generated
        self.newest = self.tickets = self.sent_at_report = 0
        self.vanished: list[int] = []  # tickets of requests that never arrive

    @rule(prompt=st.integers(0, 50), expected=st.integers(0, 20), cached=st.integers(0, 50))
    def start(self, prompt, expected, cached):
        self.names += 1
        self.tickets = ticket = self.book.start(f"r{self.names}", 0, prompt, expected, min(prompt, cached))
        self.wire.append((f"r{self.names}", ticket, prompt))

    @precondition(lambda self: self.wire)
    @rule(lost=st.booleans())
    def arrive(self, lost):
        name, ticket, prompt = self.wire.pop(0)
        if not lost:
            self.there[name], self.newest = [prompt, 0, 0], ticket
        else:
            self.vanished.append(ticket)

    @precondition(lambda self: self.there)
    @rule(data=st.data(), computed=st.integers(0, 50), generated=st.integers(0, 9), lost=st.booleans())
    def work(self, data, computed, generated, lost):
        name = data.draw(st.sampled_from(list(self.there)))
        one = self.there[name]
        one[1] = min(one[0], one[1] + computed)
        one[2] += generated if one[1] == one[0] else 0
        if not lost:
            self.book.progress(name, one[1], one[2])

    @precondition(lambda self: self.there)
    @rule(data=st.data(), lost=st.booleans(), told=st.booleans())
    def finish(self, data, lost, told):
        name = data.draw(st.sampled_from(list(self.there)))
        generated = self.there.pop(name)[2]
        if not lost:
            self.book.finish(name, generated if told else None)

    @rule()
    def report(self):
        while self.wire and self.wire[0][1] <= self.sent_at_report:  # a round trip is shorter than the time between reports
            self.arrive(lost=False)
        waiting = sum(prompt - computed for prompt, computed, _ in self.there.values())
        running = sum(computed + generated for _, computed, generated in self.there.values())
        self.book.reconcile(0, waiting, running, len(self.there), self.newest)
        load = self.book.loads[0]
        unknown = [ticket for ticket in self.vanished if ticket > max(self.newest, self.sent_at_report)]
        assert load.requests == len(self.there) + len(self.wire) + len(unknown) == len(self.book)
        assert load.waiting_tokens >= waiting and load.running_tokens >= running
        if not self.wire and not unknown:
            assert load.waiting_tokens == waiting
            if not self.there:
                assert load.tokens == 0
        self.sent_at_report = self.tickets

    @rule()
    def die(self):
        self.wire, self.there, self.vanished = [], {}, []
        self.book.forget(0)
        assert self.book.loads[0].tokens == self.book.loads[0].requests == 0

    @invariant()
    def never_negative(self):
        load = self.book.loads[0]
        assert min(load.waiting_tokens, load.running_tokens, load.requests) >= 0


TestBookAndReplica = BookAndReplica.TestCase
TestBookAndReplica.settings = settings(max_examples=80, stateful_step_count=30)
