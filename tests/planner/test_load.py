"""A replica under load: what its work bounds, how prompts share steps and wait, and what the rules of queues say."""

import math
import random
from itertools import pairwise

import pytest

from lockstep.planner import plan
from lockstep.planner.catalogue import cluster
from lockstep.planner.find import find_model
from lockstep.planner.layer import Groups, Setting, Work, layer_terms
from lockstep.planner.layout import Layout
from lockstep.planner.load import Replica, Serving, Workload, busy_share
from lockstep.planner.step import Pricer

ONE, WORK = Layout(), Workload(1000, 100)


def replica(layout=ONE, work=WORK, chunk=2048, model="llama-3.1-8b", where="8xH100"):
    return Replica(Pricer(Setting(find_model(model)[0], cluster(where))), layout, work, chunk, Serving())


@pytest.mark.parametrize("out", [1, 2, 8, 300])
def test_no_rate_is_beyond_the_work_that_it_asks_for(out):
    """Every request keeps the slowest stage busy for its prompt, and for its share of each round."""
    for layout in (Layout(), Layout(tp=4), Layout(tp=2, pp=4)):
        r = replica(layout, Workload(2000, out))
        for running in (1, 7, 64, 500):
            point = r.at(running)
            assert point.rate * r.occupancy_s(running) <= 1 + 1e-9
            in_system = point.rate * (point.ttft_s - r.serving.arrival_s + (out - 1) * point.tpot_s)
            assert in_system <= running * (1 + 1e-9), "Little's law"


def test_an_embedding_needs_no_decode_beside_it():
    found = plan("llama-3.1-8b", "1x1xH100", input_len=2000, output_len=1, rate=10)
    alone = plan("llama-3.1-8b", "1x1xH100", input_len=2000, output_len=1, rate=0.01)
    assert found.rate == 10 and found.ttft_s < 2 * alone.ttft_s
    assert plan("llama-3.1-8b", "1x1xH100", input_len=2000, output_len=1).rate < 989e12 / (2 * 8e9 * 2000), (
        "no more than the device computes"
    )


def test_short_prompts_share_a_step():
    r = replica(work=Workload(16, 16), chunk=512)
    assert r.together == 32
    one, many = r.prompts_s(1), r.prompts_s(32)
    assert many < 4 * one, "weights are read once for all of them"
    steps = [r.prompts_s(x / 4) for x in range(1, 200)]
    assert all(a <= 1.01 * b for a, b in pairwise(steps)), "between two samples of a product a price may fall by a little"
    assert r.prompts_s(64) == pytest.approx(2 * many), "beyond what fits, another step"


def test_prompts_that_share_a_step_attend_to_their_own_tokens():
    pricer = replica().pricer
    one, four, long = (
        sum(t.flops for t in pricer.terms(Layout(), Work(False, n * 500, 0.0, prompts)) if t.name == "attention")
        for n, prompts in ((1, 1), (4, 4), (4, 1))
    )
    assert four == pytest.approx(4 * one)
    assert long > 3 * four


def test_a_queue_is_that_of_the_theory():
    """M/D/1 by simulation of its own: customers that stay on after service count as present."""
    rng, service, stay, rho = random.Random(3), 1.0, 4.0, 0.7
    now = free = waited = present = 0.0
    for _ in range(200_000):
        now += rng.expovariate(rho / service)
        start = max(now, free)
        free = start + service
        waited += start - now
        present += start - now + stay
    present /= now
    assert busy_share(present, stay) == pytest.approx(rho, rel=0.02)
    assert waited / 200_000 == pytest.approx(rho / (2 * (1 - rho)), rel=0.05)
    assert 0 < busy_share(0.01, 0.5) < busy_share(1e6, 0.5) < 1


def test_at_a_rate_requests_wait_for_chance_and_without_for_the_servers_constant():
    at_rate, closed = replica(work=Workload(1000, 100, rate=5.0)), replica()
    for running in (8, 64):
        tpot = closed.at(running).tpot_s
        assert closed.queue_s(running, tpot) == pytest.approx(0.05 * running * closed.occupancy_s(running))
    assert at_rate.queue_s(1, at_rate.at(1).tpot_s) < at_rate.queue_s(90, at_rate.at(90).tpot_s)


def test_uneven_micro_batches_cost_what_each_of_them_does():
    r = replica(Layout(tp=2, pp=4), model="llama-3.1-70b")
    even, one_more, next_even = (r.round_s(b) for b in (64, 65, 68))
    assert even <= one_more <= next_even
    small, large = (r.pricer.step(r.layout, Work(True, n, r.work.decode_context)).beat_s for n in (16, 17))
    assert one_more == pytest.approx(max(r.pricer.step(r.layout, r.decode(65)).sum_s, large + 3 * small))


def test_a_later_chunk_expands_the_latents_of_all_before_it():
    s = Setting(find_model("deepseek-v3")[0], cluster("8xH200"))
    layout = Layout(tp=8)
    groups = Groups.of(layout, 8)

    def expansion(context):
        return sum(t.flops for t in layer_terms(s, layout, groups, Work(False, 1000, context), True, 0) if t.name == "latent projection")

    assert expansion(3000.0) == pytest.approx(4 * expansion(0.0))


def test_context_ranks_send_the_tokens_of_running_requests_once():
    pricer = Pricer(Setting(find_model("deepseek-v3")[0], cluster("2x8xH200")))

    def sent(layout):
        return sum(t.bytes for t in pricer.terms(layout, Work(True, 32, 1000.0)) if t.name == "dispatch to experts")

    assert sent(Layout(tp=8, dp=2, ep=16)) > 0
    assert sent(Layout(tp=8, cp=2, ep=16)) == 0, "both ranks have the same tokens: a sum over the group, nothing to dispatch"


def test_a_longer_gap_holds_the_prompts_and_the_round():
    r = replica()
    assert r.longest_gap_s(64) > r.pricer.step(r.layout, r.prompt).sum_s + r.round_s(64) - 1e-12
    assert math.isclose(replica(chunk=1000).longest_gap_s(8), r.pricer.step(r.layout, r.prompt).sum_s + r.round_s(8))


def gathered(layout, work, model="deepseek-v3", where="2x8xH200", window=0):
    """Bytes of the keys and values that a rank gets from the other context ranks in a layer."""
    s = Setting(find_model(model)[0], cluster(where))
    terms = layer_terms(s, layout, Groups.of(layout, 8), work, s.shape.moe is not None, window)
    return sum(t.bytes for t in terms if t.name == "KV all-gather over the context group")


def test_context_ranks_gather_older_tokens_too():
    """A chunk attends to all before it, and each rank keeps a part of those; by DCP a part of the older ones alone."""
    token = 576 * 2
    first, later = Work(False, 2048, 0.0), Work(False, 2048, 6000.0)
    assert gathered(Layout(tp=4, cp=2), first) == 2048 * token
    assert gathered(Layout(tp=4, cp=2), later) == (2048 + 6000) * token
    assert gathered(Layout(tp=8, dcp=4), first) == 0, "its own tokens are on all ranks"
    assert gathered(Layout(tp=8, dcp=4), later) == 6000 * token
    assert gathered(Layout(tp=8, cp=2, dcp=4), later) == 3000 * token + (2048 + 6000) * token, "from the one, then from the other"
    assert gathered(Layout(tp=8), later) == 0


def test_older_tokens_that_are_gathered_are_those_of_the_rank_s_heads_and_of_the_window():
    head = 2 * 128 * 2
    assert gathered(Layout(tp=4, cp=2), Work(False, 512, 1000.0), "llama-3.1-70b") == 1512 * 2 * head
    assert gathered(Layout(tp=16, dcp=2), Work(False, 512, 1000.0), "llama-3.1-70b") == 1000 * head
    assert gathered(Layout(tp=4, cp=2), Work(False, 512, 1000.0), "gpt-oss-120b", window=128) == (512 + 128) * 2 * 2 * 64 * 2


def test_context_ranks_of_a_latent_model_each_expand_all_tokens():
    """Latents are gathered before they become heads: sharing a prompt out does not make that less."""
    pricer = Pricer(Setting(find_model("deepseek-v3")[0], cluster("2x8xH200")))

    def expansion(layout, work):
        return sum(t.flops for t in pricer.terms(layout, work) if t.name == "latent projection")

    for work in (Work(False, 4096, 0.0), Work(False, 4096, 8192.0)):
        assert expansion(Layout(tp=4, cp=4), work) == expansion(Layout(tp=4), work)
    two = expansion(Layout(tp=4), Work(False, 1000, 300.0, 2))
    assert two == pytest.approx(expansion(Layout(tp=4), Work(False, 1600, 0.0))), "each prompt has older tokens of its own"
