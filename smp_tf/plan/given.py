"""What a user decides by files instead of leaving it to the planner."""

import dataclasses

from smp_tf.config import Config
from smp_tf.plan.partition_file import PartitionFile, partition_file_of
from smp_tf.plan.schedule_file import ScheduleFile, schedule_file_of


@dataclasses.dataclass(frozen=True)
class Given:
    """The files that a configuration names; None where it names none."""

    partition: PartitionFile | None = None
    schedule: ScheduleFile | None = None

    def contents(self) -> dict[str, str]:
        """Configuration key -> what its file says, equal on ranks that agree."""
        files = {"partition_file": self.partition, "schedule_file": self.schedule}
        return {
            key: f"content {file.digest()}" for key, file in files.items() if file
        }


def given_by(config: Config) -> Given:
    """Read the files that a configuration names.

    Raises:
        ConfigError: one cannot be read or is not what it should be.
    """
    return Given(partition_file_of(config), schedule_file_of(config))
