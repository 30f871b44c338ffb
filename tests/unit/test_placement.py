"""Where a request goes: the replica it names, then its session's, then the policy's."""

from __future__ import annotations

import pytest

from lockstep.cluster.balance import ReplicaLoad
from lockstep.cluster.placement import Placement
from lockstep.config.build import build_config
from lockstep.engine.errors import RequestError
from lockstep.protocol import EngineRequest, SamplingParams

PROMPT = list(range(64))


def request(**how: object) -> EngineRequest:
    return EngineRequest(request_id="r", prompt_token_ids=PROMPT, sampling=SamplingParams(), seed=0, **how)  # type: ignore[arg-type]


def loads(*tokens: int, down: int = -1) -> list[ReplicaLoad]:
    return [ReplicaLoad(i, routable=i != down, waiting_tokens=t) for i, t in enumerate(tokens)]


@pytest.mark.parametrize("routing", ["prefix", "shortest_queue", "round_robin"])
def test_a_named_replica_wins_whatever_it_carries(routing: str) -> None:
    placement = Placement(build_config(data_parallel_size=3, data_parallel_routing=routing))
    for _ in range(3):
        assert placement.choose(request(data_parallel_rank=1, session_id="s"), PROMPT, loads(0, 10**9, 0)) == 1


def test_replicas_are_named_by_their_number_over_all_hosts() -> None:
    placement = Placement(build_config(data_parallel_size=6, data_parallel_size_local=2, data_parallel_start_rank=4))
    for number, index in ((4, 0), (5, 1)):
        placement.check(request(data_parallel_rank=number), loads(0, 0))
        assert placement.choose(request(data_parallel_rank=number), PROMPT, loads(0, 0)) == index
    with pytest.raises(RequestError, match=r"data_parallel_rank=0 does not exist: the replicas are 4, 5"):
        placement.check(request(data_parallel_rank=0), loads(0, 0))


def test_a_replay_may_go_anywhere() -> None:
    placement = Placement(build_config(data_parallel_size=3, data_parallel_routing="shortest_queue"))
    assert placement.choose(request(data_parallel_rank=1), PROMPT, loads(5, 0, 0, down=1), again=True) == 2


def test_a_session_stays_until_its_replica_carries_too_much() -> None:
    placement = Placement(build_config(data_parallel_size=4, data_parallel_routing="round_robin"))
    home = {placement.choose(request(session_id="talk"), PROMPT, loads(0, 0, 0, 0)) for _ in range(6)}
    assert len(home) == 1
    heavy = [10**6 if i in home else 0 for i in range(4)]
    assert placement.choose(request(session_id="talk"), PROMPT, loads(*heavy)) not in home
    assert {placement.choose(request(session_id=str(i)), PROMPT, loads(0, 0, 0, 0)) for i in range(40)} == {0, 1, 2, 3}


def test_what_was_placed_by_name_is_known_to_be_cached_there() -> None:
    placement = Placement(build_config(data_parallel_size=2))
    placement.choose(request(data_parallel_rank=1), PROMPT, loads(0, 0))
    assert [placement.choose(request(), PROMPT, loads(0, 0)) for _ in range(2)] == [1, 1]
    placement.forget(1)
    assert placement.choose(request(), PROMPT, loads(0, 1)) == 0


def test_a_named_replica_that_comes_back_is_not_waited_for() -> None:
    placement = Placement(build_config(data_parallel_size=3, data_parallel_routing="shortest_queue"))
    placement.check(request(data_parallel_rank=1), loads(5, 0, 0, down=1))
    assert placement.choose(request(data_parallel_rank=1), PROMPT, loads(5, 0, 0, down=1)) == 2
    assert placement.choose(request(data_parallel_rank=1), PROMPT, loads(0, 10**9, 0)) == 1


def test_a_replica_that_takes_none_any_more_is_a_refused_request() -> None:
    placement = Placement(build_config(data_parallel_size=2))
    placement.check(request(data_parallel_rank=0), loads(0, 0, down=1))
    placement.check(request(session_id="s"), loads(0, 0, down=1))
    gone = loads(0, 0, down=1)
    gone[1].given_up = True
    with pytest.raises(RequestError, match="data_parallel_rank=1 takes no requests any more"):
        placement.check(request(data_parallel_rank=1), gone)
    with pytest.raises(RequestError, match="data_parallel_rank=2 does not exist"):
        placement.check(request(data_parallel_rank=2), loads(0, 0))
