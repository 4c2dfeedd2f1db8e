"""Variables that a step writes: their uses keep the order of one process.

Microbatches overtake each other between stages, never within one. Where several stages
of a rank use a variable that the step writes, microbatch k + 1 may therefore enter the
first of them only when microbatch k has left the last:

    stage 0 (F)  mb0         mb1         ..      a BatchNorm used at two depths: its
    stage 2 (F)        mb0         mb1           averages are written in both stages
"""

import dataclasses

from smp_tf.errors import PartitionError
from smp_tf.plan.graph import Graph
from smp_tf.plan.roles import touched_variables, written_variables
from smp_tf.plan.segment import SegmentPlan


def order_state(
    graph: Graph, plan: SegmentPlan, num_microbatches: int, *, forwards_first: bool
) -> SegmentPlan:
    """``plan`` with the waits that keep its variables right.

    Args:
        forwards_first: the schedule runs all forwards before any backward.

    Raises:
        PartitionError: with ``forwards_first``, a variable that is used in a forward
            and in a backward stage; names it and the operations.
    """
    if num_microbatches == 1:
        return plan
    needs = [set(segment.needs) for segment in plan.segments]
    after = [set(segment.after) for segment in plan.segments]
    for (index, partition), by_stage in _uses_of_written(graph, plan).items():
        stages = sorted(by_stage)
        kinds = {plan.segments[stage].kind for stage in stages}
        if forwards_first and len(kinds) > 1:
            raise PartitionError(
                "a variable that a step writes must not be used in a forward and in a"
                " backward stage of a rank when all forwards come first, or its value"
                " would depend on the order of the microbatches:"
                f" variable={graph.variables[index].name!r} partition={partition}"
                f" operations={list(by_stage.values())}; use pipeline='interleaved' or"
                " microbatches=1, or move the uses together"
            )
        for earlier, later in zip(stages, stages[1:]):
            needs[later].add(earlier)
        if len(stages) > 1:
            after[stages[0]].add(stages[-1])
    segments = tuple(
        dataclasses.replace(
            segment,
            needs=tuple(sorted(needs[segment.stage])),
            after=tuple(sorted(after[segment.stage])),
        )
        for segment in plan.segments
    )
    return dataclasses.replace(plan, segments=segments)


def _uses_of_written(
    graph: Graph, plan: SegmentPlan
) -> dict[tuple[int, int], dict[int, str]]:
    """(variable, partition) -> stage -> an operation that uses it, for written ones."""
    written: set[int] = set()
    users: dict[tuple[int, int], dict[int, str]] = {}
    for segment in plan.segments:
        for name in segment.nodes:
            node = graph.by_name[name]
            written |= written_variables(graph, node)
            for index in touched_variables(graph, node):
                users.setdefault((index, segment.partition), {}).setdefault(
                    segment.stage, name
                )
    return {key: stages for key, stages in users.items() if key[0] in written}
