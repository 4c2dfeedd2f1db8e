"""Pipelines, actions and schedules as values, and their text."""

import itertools
import textwrap

import pytest

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Kind, Message, Pipeline, Schedule, Stage
from tests.unit.plan.example_pipelines import ring, two_towers

F, B = Kind.F, Kind.B

# Kinds.


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_is_one_of_three(kind):
    assert [kind.is_compute, kind.is_send, kind.is_recv].count(True) == 1
    direction = "B" if kind.is_backward else "F"
    assert kind.is_compute or kind.value.endswith(direction)
    assert kind.send.value == f"SEND_{direction}"
    assert kind.recv.value == f"RECV_{direction}"


def test_a_backward_is_one_part_or_two():
    assert [k.value for k in Kind if k.is_compute and k.is_backward] == ["B", "I", "W"]


# Pipelines.


def test_chain():
    assert Pipeline.chain(2, 1.0, 2.0) == Pipeline(
        stages=(
            Stage(F, 0, (), 1.0),
            Stage(F, 1, (0,), 1.0),
            Stage(B, 1, (1,), 2.0),
            Stage(B, 0, (0, 2), 2.0),
        ),
        num_ranks=2,
        messages=(Message(0, 1), Message(2, 0)),
    )


def test_chain_of_split_backwards():
    assert Pipeline.chain(2, 1.0, 2.0, 3.0) == Pipeline(
        stages=(
            Stage(F, 0, (), 1.0),
            Stage(F, 1, (0,), 1.0),
            Stage(Kind.I, 1, (1,), 2.0),
            Stage(Kind.W, 1, (1, 2), 3.0),
            Stage(Kind.I, 0, (0, 2), 2.0),
            Stage(Kind.W, 0, (0, 4), 3.0),
        ),
        num_ranks=2,
        messages=(Message(0, 1), Message(2, 0)),
    )


def test_chain_of_several_pieces():
    """A turn within a rank needs no message."""
    pipeline = Pipeline.chain(2, ranks=(0, 1, 1, 0), message_seconds=0.5)
    assert [stage.rank for stage in pipeline.stages] == [0, 1, 1, 0, 0, 1, 1, 0]
    assert pipeline.messages == (
        Message(0, 1), Message(2, 0), Message(4, 1), Message(6, 0),
    )  # fmt: skip
    assert {message.seconds for message in pipeline.messages} == {0.5}
    assert pipeline.holders[:4] == ((7,), (6,), (5,), (4,))


def test_both_parts_of_a_backward_hold():
    assert Pipeline.chain(2, weight_seconds=1.0).holders[:2] == ((4, 5), (2, 3))


def test_messages_are_derived_once_and_sorted():
    assert two_towers().messages == (
        Message(0, 2),
        Message(1, 2),
        Message(2, 0),
        Message(2, 1),
        Message(3, 0),
        Message(3, 1),
    )


def test_ancestors_and_holders():
    pipeline = ring(2)  # F@0 F@1 F@0 B@0 B@1 B@0
    assert pipeline.ancestors[5] == {0, 1, 2, 3, 4}
    assert pipeline.ancestors[2] == {0, 1}
    # The first visit of rank 0 is kept until the last backward, the second only
    # until the first.
    assert pipeline.holders == ((5,), (4,), (3,), (), (), ())


def test_a_stage_that_no_backward_reads_is_held_by_the_first_that_depends_on_it():
    stages = [
        Stage(F, 0),
        Stage(F, 1, (0,)),
        Stage(B, 1, (1,)),
        Stage(B, 0, (2,)),
        Stage(B, 0, (3,)),
    ]
    assert Pipeline.from_stages(stages, 2).holders[0] == (3,)


def test_what_no_backward_of_its_rank_needs_is_not_held():
    stages = [Stage(F, 0), Stage(F, 1, (0,)), Stage(B, 1, (1,)), Stage(F, 1, (0,))]
    assert Pipeline.from_stages(stages, 2).holders == ((), (2,), (), ())


@pytest.mark.parametrize(
    ("stages", "num_ranks", "message"),
    [
        ([Stage(F, 0)], 0, "at least one rank; num_ranks=0"),
        ([Stage(F, 2)], 2, "stage 0: no such pp_rank; rank=2, num_ranks=2"),
        ([Stage(Kind.SEND_F, 0)], 1, "stage 0: a stage is F, B, I or W; kind=SEND_F"),
        ([Stage(F, 0, (0,))], 1, "stage 0: a stage may only need .*; needs=0"),
        ([Stage(F, 0, (-1,))], 1, "stage 0: a stage may only need .*; needs=-1"),
        ([Stage(F, 0, (), -1.0)], 1, "seconds=-1.0"),
        ([Stage(F, 0, (), float("nan"))], 1, "seconds=nan"),
        ([Stage(F, 0), Stage(B, 0, (0,)), Stage(F, 0, (1,))], 1, "stage 2: a forward"),
    ],
)
def test_impossible_stages(stages, num_ranks, message):
    with pytest.raises(ScheduleError, match=message):
        Pipeline.from_stages(stages, num_ranks)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "stage 1 on rank 1 needs stage 0 of rank 0, but no message carries it"),
        ([Message(0, 1), Message(0, 1)], "listed twice"),
        ([Message(0, 1), Message(1, 1)], "a rank sends itself no message"),
        ([Message(0, 1), Message(0, 2)], "no such stage or peer; .*num_ranks=2"),
        ([Message(0, 1), Message(5, 0)], "no such stage or peer; stages=2"),
        ([Message(0, 1, -1.5)], "cannot arrive before its stage begins; seconds of"),
        ([Message(0, 1, float("nan"))], "seconds must be finite, and"),
    ],
)
def test_impossible_messages(messages, message):
    with pytest.raises(ScheduleError, match=message):
        Pipeline((Stage(F, 0), Stage(F, 1, (0,))), 2, tuple(messages))


# Actions.

ACTIONS = {
    "1F0": Action(F, 1, 0),
    "12B34": Action(B, 12, 34),
    "12I3": Action(Kind.I, 12, 3),
    "13W3": Action(Kind.W, 13, 3),
    "0SEND_F2>1": Action(Kind.SEND_F, 0, 2, 1),
    "0RECV_F2<0": Action(Kind.RECV_F, 0, 2, 0),
    "5SEND_B13>10": Action(Kind.SEND_B, 5, 13, 10),
    "5RECV_B13<11": Action(Kind.RECV_B, 5, 13, 11),
}


@pytest.mark.parametrize("text", ACTIONS)
def test_action_text_round_trip(text):
    assert str(ACTIONS[text]) == text
    assert Action.from_text(text) == ACTIONS[text]


@pytest.mark.parametrize(
    "text",
    ["", "F0", "1F", "1X0", "1F0>1", "0SEND_F2", "0SEND_F2<1", "0RECV_F2>0", "-1F0",
     " 1F0", "1F0\n", "\u0661F0", "1f0"],
)  # fmt: skip
def test_text_that_is_no_action(text):
    with pytest.raises(ScheduleError, match="not an action; text="):
        Action.from_text(text)


@pytest.mark.parametrize("kind", Kind)
def test_messages_and_only_messages_have_a_peer(kind):
    with pytest.raises(ScheduleError, match=f"kind={kind.value}, stage=1, mb=2"):
        Action(kind, 1, 2, 3 if kind.is_compute else None)


# Schedules.


def test_schedule_text_round_trip():
    text = "0F0,0SEND_F0>1,2RECV_B0<1,3B0\n\n0RECV_F0<0,1F0,2B0,2SEND_B0>0\n\n"
    schedule = Schedule.from_text(text)
    assert [len(actions) for actions in schedule.ranks] == [4, 0, 4, 0]
    assert schedule.to_text() == text
    assert schedule.has_messages


def test_cells_may_be_aligned():
    assert Schedule.from_text(" 0F0 , 3B0\n1F0,2B0") == Schedule(
        ((Action(F, 0, 0), Action(B, 3, 0)), (Action(F, 1, 0), Action(B, 2, 0)))
    )


def test_lines_that_begin_with_a_hash_are_comments():
    text = "# zero_bubble, p=2\n0F0,3B0\n# rank 1\n1F0,2B0\n"
    schedule = Schedule.from_text(text)
    assert schedule == Schedule.from_text("0F0,3B0\n1F0,2B0\n")
    assert Schedule.from_text("\n# no more\n") == Schedule(((),))
    with pytest.raises(ScheduleError, match="^rank 1 step 1: "):
        Schedule.from_text("# two ranks\n0F0\n1F0,#\n")


@pytest.mark.parametrize("cell", ["1G1", ""])
def test_a_bad_cell_is_named_with_its_place(cell):
    with pytest.raises(ScheduleError, match=f"^rank 1 step 2: .*text='{cell}'"):
        Schedule.from_text(f"0F0\n1F0,2B0,{cell},2B1\n")


def drawing(text):
    """Strip the indentation of a literal drawing."""
    return textwrap.dedent(text).strip("\n")


def test_grid_in_time():
    schedule = Schedule.from_text("0F0,0F1,3B0,3B1\n1F0,2B0,1F1,2B1\n")
    grid = schedule.grid(columns=[[0, 1, 3, 5], [1, 2, 3, 4]], marks=[(0, 3)])
    assert grid == drawing(
        """
        step      0    1    2    3    4      5
        rank 0  0F0  0F1    .  3B0    .  [3B1]
        rank 1    .  1F0  2B0  1F1  2B1      .
        """
    )


def test_grid_by_position():
    assert Schedule.from_text("0F0,0F1\n\n1F0").grid() == drawing(
        """
        step      0    1
        rank 0  0F0  0F1
        rank 1    .    .
        rank 2  1F0    .
        """
    )


def test_grid_of_nothing():
    assert Schedule(((), ())).grid() == "step  \nrank 0\nrank 1"


def test_grid_shows_only_what_is_near_the_marks():
    schedule = Schedule.from_text(",".join(f"0F{mb}" for mb in range(100)))
    assert schedule.grid(marks=[(0, 50)], margin=2) == drawing(
        """
        step      48    49      50    51    52
        rank 0  0F48  0F49  [0F50]  0F51  0F52
        """
    )
    wide = schedule.grid(marks=[(0, 1), (0, 99)], margin=2)
    assert wide.splitlines()[0].split() == ["step", *map(str, range(100))]


def test_errors_carry_place_and_grid():
    error = Schedule.from_text("0F0,0F1\n").error("wrong; mb=1", (0, 1))
    assert isinstance(error, ScheduleError)
    assert str(error) == (
        "rank 0 step 1: wrong; mb=1\nstep      0      1\nrank 0  0F0  [0F1]"
    )


def test_values_are_hashable():
    values = itertools.chain(ACTIONS.values(), [ring(2), Schedule(((),))])
    assert len({hash(value) for value in values}) == len(ACTIONS) + 2
