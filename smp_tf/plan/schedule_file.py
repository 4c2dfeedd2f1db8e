"""A schedule as a small file, to be read, edited by hand, and run.

    plan.save_schedule("train.csv")               smp.plan, or a step in a job
    smp.init({"schedule_file": "train.csv"})      the step of this name follows it

    # smp_tf schedule
    # step: train_step
    # pipeline: interleaved
    # microbatches: 2
    # stages: F@0 F@1 B@1 B@0
    0F0,0F1,3B0,3B1
    1F0,2B0,1F1,2B1

One line for each pp_rank. Stage 1 is the second in ``stages``: a forward on pp_rank 1.
Messages are added where they are left out. The lines with # say which step the file is
for and what it was made of; without ``step`` it is for every step with a backward.
"""

import dataclasses
from collections.abc import Sequence

from smp_tf.config import Config
from smp_tf.errors import ConfigError, ScheduleError
from smp_tf.plan.action import Pipeline, Schedule
from smp_tf.plan.graph import short_hash
from smp_tf.plan.text_file import read_text

_TITLE = "smp_tf schedule"
_KEYS = ("step", "pipeline", "microbatches", "stages")
_AGAIN = "save it again with plan.save_schedule(path)"


@dataclasses.dataclass(frozen=True)
class ScheduleFile:
    """What such a file says.

    Attributes:
        facts: of the step that it is for, by name: some of ``_KEYS``.
        source: where it was read, for errors.
    """

    schedule: Schedule
    facts: tuple[tuple[str, str], ...] = ()
    source: str = dataclasses.field(default="", compare=False)

    def to_text(self) -> str:
        head = [f"# {_TITLE}", *(f"# {key}: {value}" for key, value in self.facts)]
        return "\n".join(head) + "\n" + self.schedule.to_text()

    def digest(self) -> str:
        """Equal for files that say the same."""
        return short_hash(self.to_text())

    def is_for(self, step: str, pipeline: Pipeline) -> bool:
        """Whether the step of this name is meant."""
        named = dict(self.facts).get("step")
        if named is not None:
            return named == step
        return any(stage.kind.is_backward for stage in pipeline.stages)


def describe_schedule(
    schedule: Schedule, pipeline: Pipeline, step: str, name: str, microbatches: int
) -> ScheduleFile:
    """What to save of a plan; its messages can be added again.

    Args:
        name: of the schedule, as in the configuration.
    """
    compute = tuple(
        tuple(action for action in actions if action.kind.is_compute)
        for actions in schedule.ranks
    )
    facts = _facts(pipeline, step, name, microbatches)
    return ScheduleFile(Schedule(compute), facts)


def parse_schedule(text: str, source: str) -> ScheduleFile:
    """Read a file's text.

    Raises:
        ConfigError: a line is no part of such a file; names ``source`` and the cell.
    """
    facts = []
    for line in text.splitlines():
        key, separator, value = line.removeprefix("#").partition(":")
        if line.startswith("#") and separator and key.strip() in _KEYS:
            facts.append((key.strip(), value.strip()))
    try:
        schedule = Schedule.from_text(text)
    except ScheduleError as error:
        raise ConfigError(
            f"`schedule_file`: {error}; schedule_file={source}"
        ) from None
    return ScheduleFile(schedule, tuple(facts), source)


def schedule_file_of(config: Config) -> ScheduleFile | None:
    """Read the file that a configuration names; None if it names none.

    Raises:
        ConfigError: as ``parse_schedule``, or the file cannot be read.
    """
    if config.schedule_file is None:
        return None
    text = read_text("schedule_file", config.schedule_file, _AGAIN)
    return parse_schedule(text, repr(config.schedule_file))


def follow_schedule(
    given: ScheduleFile, pipeline: Pipeline, step: str, name: str, microbatches: int
) -> Schedule:
    """The file's schedule for a step; still to be checked.

    Raises:
        ScheduleError: the file was made for something else; says what differs.
    """
    for key, ours in _facts(pipeline, step, name, microbatches):
        theirs = dict(given.facts).get(key, ours)
        if theirs != ours:
            raise ScheduleError(
                f"`schedule_file`: the file was made for another step or plan: step="
                f"{step!r} has {key}={ours!r}, the file {key}={theirs!r};"
                f" schedule_file={given.source}; {_AGAIN}"
            )
    return given.schedule


def _facts(
    pipeline: Pipeline, step: str, name: str, microbatches: int
) -> tuple[tuple[str, str], ...]:
    values: Sequence[str] = (
        step,
        name,
        str(microbatches),
        " ".join(f"{stage.kind.value}@{stage.rank}" for stage in pipeline.stages),
    )
    return tuple(zip(_KEYS, values, strict=True))
