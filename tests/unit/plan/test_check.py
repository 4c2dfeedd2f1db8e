"""The checker and the dry run: every broken rule has an error that shows it."""

import random

import pytest

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Kind, Message, Pipeline, Schedule, Stage
from smp_tf.plan.check import Report, check
from smp_tf.plan.comm import add_messages
from smp_tf.plan.dry_run import dry_run, time_steps
from smp_tf.plan.schedules import NAMES, build
from tests.unit.plan.example_pipelines import random_pipeline_of_all_kinds, two_towers

F, B = Kind.F, Kind.B
CHAIN = Pipeline.chain(2)  # 0:F@0 1:F@1 2:B@1 3:B@0

GOOD = """\
0F0,0SEND_F0>1,0F1,0SEND_F1>1,2RECV_B0<1,3B0,2RECV_B1<1,3B1
0RECV_F0<0,1F0,2B0,2SEND_B0>0,0RECV_F1<0,1F1,2B1,2SEND_B1>0
"""


def fails(text, pipeline=CHAIN, num_microbatches=2, active_microbatches=None):
    """Return the text of the error that a schedule raises."""
    schedule = Schedule.from_text(text)
    with pytest.raises(ScheduleError) as caught:
        check(schedule, pipeline, num_microbatches, active_microbatches)
    return str(caught.value)


# Figures.


def test_report_of_a_good_schedule():
    assert check(Schedule.from_text(GOOD), CHAIN, 2, 2) == Report(
        seconds=6.0, bubble=pytest.approx(1 / 3), peak_live=(2, 1), messages=4,
        peak_pieces=(2, 1), span=6.0,
    )  # fmt: skip


def test_report_without_messages():
    text = "0F0,0F1,3B0,3B1\n1F0,2B0,1F1,2B1\n"
    assert check(Schedule.from_text(text), CHAIN, 2) == Report(
        seconds=6.0, bubble=pytest.approx(1 / 3), peak_live=(2, 1), messages=0,
        peak_pieces=(2, 1), span=6.0,
    )  # fmt: skip


def test_seconds_are_those_of_the_stages():
    pipeline = Pipeline.chain(2, forward_seconds=0.5, backward_seconds=1.0)
    report = check(Schedule.from_text(GOOD), pipeline, 2)
    assert (report.seconds, report.bubble) == (4.5, pytest.approx(1 / 3))


def test_nothing_to_do():
    nothing = Report(0.0, 0.0, peak_live=(0, 0), messages=0, peak_pieces=(0, 0))
    assert check(Schedule(((), ())), Pipeline((), 2), 4) == nothing
    free = Pipeline((Stage(F, 0, (), 0.0),), 1)
    assert check(Schedule.from_text("0F0\n"), free, 1).bubble == 0.0


def test_time_steps_give_every_action_one():
    schedule = Schedule.from_text(GOOD)
    steps = time_steps(schedule, CHAIN)
    assert steps == ((0, 1, 2, 3, 6, 7, 10, 11), (2, 3, 4, 5, 6, 7, 8, 9))
    assert schedule.grid(steps).splitlines()[2].split()[2:6] == [
        ".", ".", "0RECV_F0<0", "1F0",
    ]  # fmt: skip


def test_a_message_is_there_some_seconds_after_it_was_sent():
    pipeline = Pipeline.chain(2, message_seconds=0.5)
    bare = check(Schedule.from_text("0F0,0F1,3B0,3B1\n1F0,2B0,1F1,2B1\n"), pipeline, 2)
    full = check(Schedule.from_text(GOOD), pipeline, 2)
    # On rank 1: from 1.5 to 5.5; back on rank 0 from 6 to 7. The sender never waits.
    assert (bare.seconds, full.seconds) == (7.0, 7.0)
    ends = dry_run(Schedule.from_text(GOOD), pipeline, lambda action: 0.0)
    assert ends[0][:4] == (0.0, 0.0, 0.0, 0.0)
    assert ends[1][:2] == (0.5, 0.5)
    assert time_steps(Schedule.from_text(GOOD), pipeline) == time_steps(
        Schedule.from_text(GOOD), CHAIN
    )


def test_span_is_that_of_the_rank_that_takes_longest():
    """Rank 1 works from step 1 to step 4, rank 0 from the start to step 6."""
    forward = Pipeline.from_stages([Stage(F, 0), Stage(F, 1, (0,), 3.0)], 2)
    report = check(Schedule.from_text("0F0,0F1\n1F0,1F1\n"), forward, 2)
    assert (report.seconds, report.span) == (7.0, 6.0)


def test_pieces_are_counted_one_by_one():
    """Rank 0 has both pieces; one microbatch in flight may be there twice."""
    pipeline = Pipeline.chain(1, ranks=(0, 0))
    report = check(Schedule.from_text("0F0,1F0,0F1,2B0,1F1,2B1,3B0,3B1\n"), pipeline, 2)
    assert (report.peak_live, report.peak_pieces) == ((2,), (3,))


# Errors.


def test_the_error_shows_the_schedule():
    text = "0F0,3B0\n2B0,1F0\n"
    assert fails(text, num_microbatches=1) == (
        "rank 1 step 0: 2B0 takes the outputs of 1F0, which has not run before it\n"
        "step        0    1\n"
        "rank 0    0F0  3B0\n"
        "rank 1  [2B0]  1F0"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # complete
        ("1F1,2B1", "1F1", "rank 1: 2B1 is missing\nstep"),
        ("3B1", "3B0", "rank 0 step 7: 3B0 for the second time\nstep"),
        ("3B1", "3B2", "rank 0 step 7: 3B2 does not belong here; stage 3 is B of rank "
         "0 and goes to ranks [], num_microbatches=2\nstep"),
        ("3B1", "1F0", "rank 0 step 7: 1F0 does not belong here; stage 1 is F of rank "
         "1 and goes to ranks [], num_microbatches=2\nstep"),
        ("3B1", "4B1", "rank 0 step 7: 4B1 does not belong here; stages=4, "),
        ("3B1", "3F1", "rank 0 step 7: 3F1 does not belong here; stage 3 is B of"),
        ("0SEND_F0>1", "0SEND_F0>0", "rank 0 step 1: 0SEND_F0>0 does not belong here; "
         "stage 0 is F of rank 0 and goes to ranks [1], num_microbatches=2\nstep"),
        ("0SEND_F0>1,", "", "rank 1 step 0: 0RECV_F0<0 has no 0SEND_F0>1 on rank 0"),
        ("0RECV_F1<0,", "", "rank 0 step 3: 0SEND_F1>1 has no 0RECV_F1<0 on rank 1"),
        # in order
        ("0F0,0SEND_F0>1", "0SEND_F0>1,0F0", "rank 0 step 0: 0SEND_F0>1 takes the "
         "outputs of 0F0, which has not run before it\nstep"),
        ("0RECV_F1<0,1F1", "1F1,0RECV_F1<0", "rank 1 step 4: 1F1 takes the outputs of "
         "0F1, which has not arrived from rank 0 before it\nstep"),
        ("0F0,0SEND_F0>1,0F1,0SEND_F1>1", "0F1,0SEND_F1>1,0F0,0SEND_F0>1",
         "rank 0 step 0: 0F1 out of turn; a stage takes its microbatches in ascending "
         "order, next=0\nstep"),
    ],
)  # fmt: skip
def test_one_thing_wrong(old, new, message):
    assert GOOD.count(old) == 1
    text = GOOD.replace(old, new)
    error = fails(text)
    assert error.startswith(message)
    assert ("[" in error.split("\n", 1)[1]) == ("missing" not in message)


def test_a_message_that_neither_side_has():
    text = GOOD.replace("0SEND_F1>1,", "").replace("0RECV_F1<0,", "")
    assert fails(text).startswith("rank 0: 0SEND_F1>1 is missing\n")


def test_a_rank_too_few():
    assert "ranks=1, num_ranks=2" in fails("0F0,3B0\n")


def test_too_many_microbatches_in_flight():
    error = fails(GOOD, active_microbatches=1)
    assert error.startswith(
        "rank 0 step 2: 0F1 is one microbatch in flight too many; in_flight=[0, 1], "
        "active_microbatches=1\nstep"
    )
    assert "[0F1]" in error


SPLIT = Pipeline.chain(2, weight_seconds=1.0)  # 0:F@0 1:F@1 2:I@1 3:W@1 4:I@0 5:W@0

GOOD_SPLIT = """\
0F0,0SEND_F0>1,0F1,0SEND_F1>1,2RECV_B0<1,4I0,2RECV_B1<1,4I1,5W0,5W1
0RECV_F0<0,1F0,2I0,2SEND_B0>0,0RECV_F1<0,1F1,2I1,2SEND_B1>0,3W0,3W1
"""


def test_split_backwards():
    report = check(Schedule.from_text(GOOD_SPLIT), SPLIT, 2, 2)
    assert (report.seconds, report.peak_live) == (8.0, (2, 2))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3W0,3W1", "3W0", "rank 1: 3W1 is missing\nstep"),
        ("3W0,3W1", "3W1,3W0", "rank 1 step 8: 3W1 out of turn; a stage takes its "
         "microbatches in ascending order, next=0\nstep"),
        ("5W0,5W1", "5W0,5W0", "rank 0 step 9: 5W0 for the second time\nstep"),
        ("5W0,5W1", "5W0,5I1", "rank 0 step 9: 5I1 does not belong here; stage 5 is W "
         "of rank 0 and goes to ranks [], num_microbatches=2\nstep"),
        ("5W0,5W1", "5W0,3W1", "rank 0 step 9: 3W1 does not belong here; stage 3 is W "
         "of rank 1"),
        ("4I0,2RECV_B1<1,4I1,5W0", "5W0,4I0,2RECV_B1<1,4I1", "rank 0 step 5: 5W0 takes "
         "the outputs of 4I0, which has not run before it\nstep"),
        ("1F0,2I0,2SEND_B0>0", "1F0,2SEND_B0>0,2I0", "rank 1 step 2: 2SEND_B0>0 takes "
         "the outputs of 2I0, which has not run before it\nstep"),
    ],
)  # fmt: skip
def test_one_thing_wrong_with_split_backwards(old, new, message):
    assert GOOD_SPLIT.count(old) == 1
    error = fails(GOOD_SPLIT.replace(old, new), SPLIT)
    assert error.startswith(message)
    assert ("[" in error.split("\n", 1)[1]) == ("missing" not in message)


def test_a_pending_w_keeps_its_microbatch_in_flight():
    error = fails(GOOD_SPLIT, SPLIT, active_microbatches=1)
    assert error.startswith("rank 0 step 2: 0F1 is one microbatch in flight too many; ")
    text = "0F0,4I0,5W0,0F1,4I1,5W1\n1F0,2I0,1F1,2I1,3W0,3W1\n"
    error = fails(text, SPLIT, active_microbatches=1)
    assert error == (
        "rank 1 step 2: 1F1 is one microbatch in flight too many; in_flight=[0, 1], "
        "active_microbatches=1\n"
        "step      0    1      2    3    4    5\n"
        "rank 0  0F0  4I0    5W0  0F1  4I1  5W1\n"
        "rank 1  1F0  2I0  [1F1]  2I1  3W0  3W1"
    )


def test_a_holder_before_its_forward_is_a_deadlock():
    """Stage 3 needs stage 0 only through rank 1, so that no rank alone sees it."""
    stages = [Stage(F, 0), Stage(F, 1, (0,)), Stage(B, 1, (1,)), Stage(B, 0, (2,))]
    error = fails("3B0,0F0\n1F0,2B0\n", Pipeline.from_stages(stages, 2), 1)
    assert "deadlock" in error


def test_two_ranks_that_wait_for_each_other():
    """Each receives before it sends; no message is missing and no order wrong."""
    error = fails(
        "0F0,0SEND_F0>1,2RECV_B1<1,0F1,0SEND_F1>1,2RECV_B0<1,3B0,3B1\n"
        "0RECV_F0<0,1F0,2B0,2SEND_B0>0,0RECV_F1<0,1F1,2B1,2SEND_B1>0\n"
    )
    assert error.startswith(
        "rank 0 step 2: deadlock; "
        "rank 0 step 2: 2RECV_B1<1 waits for 2SEND_B1>0, step 7 of rank 1; "
        "rank 1 step 4: 0RECV_F1<0 waits for 0SEND_F1>1, step 4 of rank 0\n"
    )
    assert "[2RECV_B1<1]" in error
    assert "[0RECV_F1<0]" in error


def test_a_deadlock_without_messages():
    text = "0F0,3B0,0F1,3B1\n1F0,1F1,2B0,2B1\n"
    error = fails(text)
    assert "rank 0 step 1: 3B0 waits for 2B0, step 2 of rank 1; " in error
    assert "rank 1 step 1: 1F1 waits for 0F1, step 2 of rank 0\n" in error


def test_a_deadlock_names_the_circle_and_not_its_victims():
    stages = [Stage(F, 0), Stage(F, 1), Stage(F, 2)]
    stages += [Stage(F, 2, (1,)), Stage(F, 1, (2,)), Stage(F, 0, (3,))]
    error = fails(
        "0F0,5F0\n4F0,1F0\n3F0,2F0\n",
        Pipeline.from_stages(stages, 3),
        num_microbatches=1,
    )
    assert error.startswith("rank 1 step 0: deadlock; rank 1 step 0: 4F0 waits for 2F0")
    assert "5F0 waits" not in error
    assert "[4F0]" in error and "[3F0]" in error and "[5F0]" not in error


# The link contract.


@pytest.mark.parametrize("name", NAMES)
def test_fewer_microbatches_than_ranks(name):
    """torchtitan issue 775: 1F1B hung when there were fewer microbatches."""
    pipeline = Pipeline.chain(4)
    for m in (1, 2, 3):
        schedule = add_messages(build(name, pipeline, m, 6), pipeline)
        assert check(schedule, pipeline, m).seconds == 2 * (m + 3)


def test_a_message_waits_in_its_channel():
    """Rank 0 sends twice before rank 1 receives once, in the other order."""
    stages = [Stage(F, 0), Stage(F, 0), Stage(F, 1, (1,)), Stage(F, 1, (0,))]
    pipeline = Pipeline.from_stages(stages, 2)
    schedule = Schedule.from_text(
        "0F0,0SEND_F0>1,1F0,1SEND_F0>1\n1RECV_F0<0,2F0,0RECV_F0<0,3F0\n"
    )
    assert check(schedule, pipeline, 1).seconds == 4.0


def test_the_same_outputs_go_to_two_ranks():
    pipeline = two_towers()
    schedule = add_messages(build("interleaved", pipeline, 3, 5), pipeline)
    assert check(schedule, pipeline, 3).messages == 18


def test_dry_run_gives_the_end_of_every_action():
    ends = dry_run(
        Schedule.from_text("0F0,0F1\n1F0,1F1\n"),
        Pipeline.from_stages([Stage(F, 0), Stage(F, 1, (0,))], 2, [Message(1, 0)]),
        lambda action: 2.0 if action.stage == 0 else 1.0,
    )
    assert ends == ((2.0, 4.0), (3.0, 5.0))


# Any damage is found.


@pytest.mark.parametrize("seed", range(60))
def test_a_missing_or_doubled_action_is_always_found(seed):
    draw = random.Random(seed)
    pipeline = random_pipeline_of_all_kinds(seed, NAMES[seed % 3])
    schedule = add_messages(build(NAMES[seed % 3], pipeline, 3, 3), pipeline)
    ranks = [list(actions) for actions in schedule.ranks]
    rank = draw.choice([rank for rank, actions in enumerate(ranks) if actions])
    position = draw.randrange(len(ranks[rank]))
    if draw.random() < 0.5:
        del ranks[rank][position]
    else:
        ranks[rank].append(ranks[rank][position])
    with pytest.raises(ScheduleError):
        check(Schedule(tuple(map(tuple, ranks))), pipeline, 3)


@pytest.mark.parametrize("seed", range(60))
def test_a_swap_is_harmless_or_found(seed):
    """After any swap of neighbours, the check agrees with a naive simulation."""
    draw = random.Random(seed)
    pipeline = random_pipeline_of_all_kinds(seed, NAMES[seed % 3])
    schedule = add_messages(build(NAMES[seed % 3], pipeline, 3, 3), pipeline)
    ranks = [list(actions) for actions in schedule.ranks]
    long_enough = [rank for rank, actions in enumerate(ranks) if len(actions) > 1]
    for _ in range(5 if long_enough else 0):
        swapped = [list(actions) for actions in ranks]
        here = swapped[draw.choice(long_enough)]
        at = draw.randrange(len(here) - 1)
        here[at], here[at + 1] = here[at + 1], here[at]
        try:
            check(Schedule(tuple(map(tuple, swapped))), pipeline, 3)
            accepted = True
        except ScheduleError:
            accepted = False
        assert accepted == runs(swapped, pipeline)


def runs(ranks, pipeline):
    """Run a schedule step by step, in the dullest way; say whether it works."""
    at = [0] * len(ranks)
    have = [set() for _ in ranks]  # (stage, mb) on each rank
    mail = set()  # (stage, mb, receiver)
    turn = [0] * len(pipeline.stages)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(ranks):
            if at[rank] == len(actions):
                continue
            action = actions[at[rank]]
            key = (action.stage, action.mb)
            if action.kind.is_recv:
                if (*key, rank) not in mail:
                    continue
                mail.remove((*key, rank))
                have[rank].add(key)
            elif action.kind.is_send:
                if key not in have[rank]:
                    return False
                mail.add((*key, action.peer))
            else:
                needs = pipeline.stages[action.stage].needs
                if any((need, action.mb) not in have[rank] for need in needs):
                    return False
                if turn[action.stage] != action.mb:
                    return False
                after = pipeline.stages[action.stage].after
                if any(turn[other] < action.mb for other in after):
                    return False
                turn[action.stage] += 1
                have[rank].add(key)
            at[rank] += 1
            moved = True
    return all(at[rank] == len(actions) for rank, actions in enumerate(ranks))
