"""Where what the library says is seen: on stderr if the script configures no logging.

Rank 0 tells which partition was chosen, as a table and, where ``SMP_LOG_JSON`` names a
file, as one line of JSON. To see warnings only:

    logging.getLogger("smp_tf").setLevel(logging.WARNING)
"""

import datetime
import json
import logging
import sys
from pathlib import Path

from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.partition_json import partition_event
from smp_tf.report.partition_table import partition_table

logger = logging.getLogger("smp_tf")


class _ToStderr(logging.Handler):
    """Silent once the script has handlers of its own, which get the same records."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and sys.stderr is not None:
            print(self.format(record), file=sys.stderr, flush=True)


def show_by_default() -> None:
    """Python shows warnings only where nothing is configured; show INFO as well."""
    if logger.handlers or logging.getLogger().handlers:
        return
    logger.addHandler(_ToStderr())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def tell_partition(step: str, plan: StepPlan, json_log: Path | None) -> None:
    """A model has been partitioned."""
    if logger.isEnabledFor(logging.INFO):
        table = partition_table(plan)
        logger.info("partition of step=%s schedule=%s\n%s", step, plan.pipeline, table)
    if json_log is None:
        return
    now = datetime.datetime.now(datetime.timezone.utc)
    event = partition_event(step, plan, now.isoformat(timespec="milliseconds"))
    try:
        with json_log.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(event)}\n")
    except OSError as error:  # a full disk is no reason to end the training
        logger.warning("SMP_LOG_JSON=%s cannot be written: %s", json_log, error)
