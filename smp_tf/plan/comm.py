"""The pass that adds messages: compute actions in, SEND and RECV beside them out.

    rank 0   0F0          0SEND_F0>1   2RECV_B0<1   3B0
    rank 1   0RECV_F0<0   1F0          2B0          2SEND_B0>0

A send stands directly behind the stage whose outputs it carries, a receive directly
before the first action that reads them. Whether that order can hang is a question
of the link contract: see `check`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Pipeline, Schedule

__all__ = ["add_messages"]


def add_messages(schedule: Schedule, pipeline: Pipeline) -> Schedule:
    """Add a SEND and a RECV for every message of every microbatch.

    Args:
        schedule: compute actions only.
        pipeline: the pipeline that the schedule was built for.

    Returns:
        The same order of compute actions. Sends of one action are in order of peers;
        receives for one action in order of stages; what a rank only returns, and
        no stage of it reads, is received at its end.

    Raises:
        ScheduleError: the schedule has messages already, stages that the pipeline
            does not have, or not one list for each of its ranks.
    """
    if len(schedule.ranks) != pipeline.num_ranks:
        raise ScheduleError(
            "a schedule has one list for each rank; "
            f"ranks={len(schedule.ranks)}, num_ranks={pipeline.num_ranks}"
        )
    for rank, actions in enumerate(schedule.ranks):
        for step, action in enumerate(actions):
            if not action.kind.is_compute or action.stage >= len(pipeline.stages):
                raise ScheduleError(
                    f"rank {rank} step {step}: only compute actions of the pipeline's "
                    f"own stages can be given messages; action={action}, "
                    f"stages={len(pipeline.stages)}"
                )
    made: dict[int, list[int]] = defaultdict(list)
    for actions in schedule.ranks:
        for action in actions:
            made[action.stage].append(action.mb)
    return Schedule(
        tuple(
            tuple(_with_messages(rank, schedule.ranks[rank], made, pipeline))
            for rank in range(pipeline.num_ranks)
        )
    )


def _with_messages(
    rank: int,
    actions: Sequence[Action],
    made: Mapping[int, list[int]],
    pipeline: Pipeline,
) -> list[Action]:
    """List the actions of one rank, with its messages in place.

    Args:
        rank: whose actions they are.
        actions: without messages.
        made: stage -> its microbatches, on any rank.
        pipeline: stages and messages.
    """
    peers: dict[int, list[int]] = defaultdict(list)
    inbound = set()
    for message in sorted(pipeline.messages):
        peers[message.stage].append(message.peer)
        if message.peer == rank:
            inbound.add(message.stage)
    awaited = [sorted(inbound.intersection(s.needs)) for s in pipeline.stages]
    arrived: set[tuple[int, int]] = set()
    found: list[Action] = []

    def receive(stage: int, mb: int) -> None:
        if (mb, stage) not in arrived:
            arrived.add((mb, stage))
            source = pipeline.stages[stage]
            found.append(Action(source.kind.recv, stage, mb, source.rank))

    for action in actions:
        for need in awaited[action.stage]:
            receive(need, action.mb)
        found.append(action)
        for peer in peers[action.stage]:
            found.append(Action(action.kind.send, action.stage, action.mb, peer))
    for mb, stage in sorted((mb, stage) for stage in inbound for mb in made[stage]):
        receive(stage, mb)
    return found
