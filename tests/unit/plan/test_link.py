import itertools

import pytest

from smp_tf.plan.link import SAME_HOST, Link, link_between, rounds_of_pairs
from tests.unit.plan.example_graphs import analyse, chain

SLOW = Link(latency_seconds=0.02, bytes_per_second=1e6)


def test_a_message_takes_its_latency_and_its_bytes():
    assert SLOW.seconds(0) == 0.02
    assert SLOW.seconds(500_000) == pytest.approx(0.52)
    assert link_between({(0, 1): SLOW}, 0, 1) is SLOW
    assert link_between({(0, 1): SLOW}, 1, 0) is SAME_HOST


@pytest.mark.parametrize("count", range(1, 12))
def test_all_pairs_meet_once_and_nobody_is_in_two_places(count):
    rounds = rounds_of_pairs(count)
    for pairs in rounds:
        ranks = list(itertools.chain.from_iterable(pairs))
        assert len(ranks) == len(set(ranks))
    met = sorted(itertools.chain.from_iterable(rounds))
    assert met == list(itertools.combinations(range(count), 2))
    assert len(rounds) <= count  # as many as it takes


def test_the_messages_of_a_plan_take_what_their_own_link_takes():
    step = analyse(chain(3))
    plan = step.cut([0, 1, 2], links={(1, 2): SLOW})
    messages = plan.pipeline().messages
    assert {message.peer for message in messages} == {0, 1, 2}
    for message in messages:
        segment = plan.segments[message.stage]
        link = SLOW if (segment.partition, message.peer) == (1, 2) else SAME_HOST
        num_bytes = sum(
            cut.spec.num_bytes
            for cut in plan.cuts
            if (cut.stage, cut.peer) == (message.stage, message.peer)
        )
        assert message.seconds == pytest.approx(
            max(link.seconds(num_bytes) - segment.late_seconds, -segment.seconds)
        )
