"""The pass that adds messages: where each one stands."""

import pytest

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Kind, Message, Pipeline, Schedule, Stage
from smp_tf.plan.comm import add_messages
from tests.unit.plan.example_pipelines import two_towers

F, B = Kind.F, Kind.B


def lowered(text, pipeline):
    """Add messages to a schedule given as text; return one list of text a rank."""
    schedule = add_messages(Schedule.from_text(text), pipeline)
    return [[str(action) for action in actions] for actions in schedule.ranks]


def test_send_behind_and_receive_before():
    assert lowered("0F0,0F1,3B0,3B1\n1F0,2B0,1F1,2B1\n", Pipeline.chain(2)) == [
        "0F0 0SEND_F0>1 0F1 0SEND_F1>1 2RECV_B0<1 3B0 2RECV_B1<1 3B1".split(),
        (
            "0RECV_F0<0 1F0 2B0 2SEND_B0>0 0RECV_F1<0 1F1 2B1 2SEND_B1>0".split()
        ),
    ]


def test_sends_in_order_of_peers_receives_in_order_of_stages():
    assert lowered("0F0,4B0\n1F0,5B0\n2F0,3B0\n", two_towers()) == [
        "0F0 0SEND_F0>2 3RECV_B0<2 4B0 2RECV_F0<2".split(),
        "1F0 1SEND_F0>2 3RECV_B0<2 5B0 2RECV_F0<2".split(),
        (
            "0RECV_F0<0 1RECV_F0<1 2F0 2SEND_F0>0 2SEND_F0>1 "
            "3B0 3SEND_B0>0 3SEND_B0>1".split()
        ),
    ]


def test_a_message_is_received_once_by_the_first_who_reads_it():
    stages = [Stage(F, 0), Stage(F, 1, (0,)), Stage(B, 1, (0, 1))]
    pipeline = Pipeline.from_stages(stages, 2)
    assert lowered("0F0\n1F0,2B0\n", pipeline)[1] == ["0RECV_F0<0", "1F0", "2B0"]


def test_what_is_only_returned_arrives_at_the_end():
    stages = [Stage(F, 0), Stage(F, 0, (0,)), Stage(F, 1)]
    returns = [Message(1, 1), Message(0, 1)]
    pipeline = Pipeline.from_stages(stages, 2, returns)
    assert lowered("0F0,0F1,1F0,1F1\n2F0,2F1\n", pipeline)[1] == [
        "2F0", "2F1", "0RECV_F0<0", "1RECV_F0<0", "0RECV_F1<0", "1RECV_F1<0",
    ]  # fmt: skip


def test_an_idle_rank_may_still_receive():
    pipeline = Pipeline.from_stages([Stage(F, 0)], 2, [Message(0, 1)])
    assert lowered("0F0\n\n", pipeline) == [["0F0", "0SEND_F0>1"], ["0RECV_F0<0"]]


def test_one_rank_has_no_messages():
    pipeline = Pipeline.chain(1)
    schedule = Schedule.from_text("0F0,1B0\n")
    assert add_messages(schedule, pipeline) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0\n", "one list for each rank; ranks=1, num_ranks=2"),
        ("0F0,0SEND_F0>1\n1F0\n", "rank 0 step 1: .*action=0SEND_F0>1, stages=4"),
        ("0F0\n1F0,9B0\n", "rank 1 step 1: .*action=9B0, stages=4"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ScheduleError, match=message):
        add_messages(Schedule.from_text(text), Pipeline.chain(2))
