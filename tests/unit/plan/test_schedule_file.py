"""A saved schedule: text and back, edited by hand and run, or refused."""

import pytest

from smp_tf.config import resolve
from smp_tf.errors import ConfigError, ScheduleError
from smp_tf.plan.given import Given, given_by
from smp_tf.plan.plan_step import plan_step
from smp_tf.plan.schedule_file import parse_schedule
from tests.unit.plan.example_graphs import chain, used_twice


def plan(graph, given=None, name="train", **config):
    config = resolve({"microbatches": 2, "partitions": 2, **config}, 2)
    return plan_step(graph, config, {}, {}, given=Given(schedule=given), name=name)


@pytest.fixture
def saved(tmp_path):
    """Function: text of a plan's schedule."""

    def text_of(found):
        path = tmp_path / "schedule.csv"
        found.save_schedule(path)
        return path.read_text()

    return text_of


def given(text):
    return parse_schedule(text, "'s.csv'")


def test_a_file_is_read_by_people_and_by_us(saved):
    text = saved(plan(chain(2)))
    assert text == (
        "# smp_tf schedule\n"
        "# step: train\n"
        "# pipeline: interleaved\n"
        "# microbatches: 2\n"
        "# stages: F@0 F@1 B@1 B@0\n"
        "0F0,0F1,3B0,3B1\n"
        "1F0,2B0,1F1,2B1\n"
    )
    assert given(text).to_text() == text
    assert given(text).digest() == given(text).digest()
    assert given(text).digest() != given(text.replace("train", "other")).digest()


@pytest.mark.parametrize("pipeline", ["interleaved", "simple", "zero_bubble"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_saved_schedule_is_the_same_again(saved, pipeline, count):
    first = plan(chain(4), pipeline=pipeline, microbatches=count)
    again = plan(chain(4), given(saved(first)), pipeline=pipeline, microbatches=count)
    assert (again.schedule, again.report) == (first.schedule, first.report)


def test_an_edited_schedule_runs_in_its_order(saved):
    text = saved(plan(chain(2)))
    edited = text.replace("1F0,2B0,1F1,2B1", "1F0, 1F1, 2B0, 2B1")
    found = plan(chain(2), given(edited))
    computed = [str(a) for a in found.schedule.ranks[1] if a.kind.is_compute]
    assert computed == ["1F0", "1F1", "2B0", "2B1"]
    assert found.schedule.has_messages


def test_messages_may_be_placed_by_hand(saved):
    whole = plan(chain(2)).schedule
    found = plan(chain(2), given(whole.to_text()))
    assert found.schedule == whole


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("1F0,2B0", "2B0,1F0", r"2B0 takes the outputs of 1F0.*\n.*\n.*\n.*\[2B0\]"),
        ("0F0,0F1", "0F0", "rank 0: 0F1 is missing"),
        ("3B0,3B1", "3B1,3B0", r"3B1 out of turn.*next=0(.|\n)*\[3B1\]"),
        ("0F0,0F1", "0F0,0F0,0F1", r"0F0 for the second time(.|\n)*\[0F0\]"),
        ("1F0,2B0,1F1,2B1\n", "", "one list for each rank; ranks=1, num_ranks=2"),
    ],
)
def test_an_invalid_one_is_refused_where_it_breaks(saved, old, new, problem):
    text = saved(plan(chain(2)))
    assert old in text
    with pytest.raises(ScheduleError, match=problem):
        plan(chain(2), given(text.replace(old, new)))


def test_more_in_flight_than_allowed_is_refused(saved):
    text = saved(plan(chain(2), microbatches=4))
    greedy = text.replace("0F0,0F1,3B0,0F2,3B1,0F3,3B2,3B3", "").splitlines()
    greedy = [*greedy[:5], "0F0,0F1,0F2,0F3,3B0,3B1,3B2,3B3", greedy[6]]
    four = given("\n".join(greedy) + "\n")
    assert plan(chain(2), four, microbatches=4).report.peak_live[0] == 4
    with pytest.raises(ScheduleError, match="in_flight=.*active_microbatches=3"):
        plan(chain(2), four, microbatches=4, active_microbatches=3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"microbatches": 3}, "has microbatches='3', the file microbatches='2'"),
        ({"pipeline": "simple"}, "has pipeline='simple', the file pipeline='interl"),
        ({"virtual_stages": 2}, "has stages='F@0 F@1 F@0 F@1 B@1 "),
    ],
)
def test_a_file_for_another_plan_is_refused(saved, change, problem):
    text = saved(plan(chain(4)))
    with pytest.raises(ScheduleError, match=f"{problem}.*schedule_file='s.csv'; save"):
        plan(chain(4), given(text), **change)


def test_another_step_has_its_own_schedule(saved):
    text = saved(plan(chain(2)))
    found = plan(chain(2), given(text), name="evaluate", microbatches=4)
    assert found.schedule == plan(chain(2), microbatches=4).schedule
    advice = found.advice[0]
    assert "not for this step" in advice and "schedule_file='s.csv'" in advice
    # Without a name it is for what has a backward.
    anonymous = given(text.replace("# step: train\n", "").replace("1F0,2B0", "2B0,1F0"))
    assert plan(used_twice(), anonymous).advice
    with pytest.raises(ScheduleError, match="takes the outputs"):
        plan(chain(2), anonymous, name="evaluate")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0F0,1X1\n", "rank 0 step 1: not an action; text='1X1'.*file='s.csv'"),
        ("0F0,\n", "rank 0 step 1: not an action; text=''"),
    ],
)
def test_what_is_no_schedule(text, problem):
    with pytest.raises(ConfigError, match=problem):
        given(text)


def test_files_that_cannot_be_read(tmp_path):
    def read(path):
        return given_by(resolve({"partitions": 2, "schedule_file": path}, 2))

    with pytest.raises(ConfigError, match="`schedule_file`: cannot be read: .*nowhere"):
        read("/nowhere/s.csv")
    (tmp_path / "s.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8' codec"):
        read(tmp_path / "s.csv")
