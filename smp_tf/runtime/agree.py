"""Ranks that build a step together must have traced the same step."""

from collections.abc import Sequence

from smp_tf.errors import PartitionError, TraceError
from smp_tf.plan.graph import Graph
from smp_tf.plan.profile import Profile, layer_paths
from smp_tf.plan.step_plan import StepPlan
from smp_tf.runtime import session


def require_same_graph(step: str, graph: Graph, first_channel: int) -> None:
    """Compare the traced graph with those of the other ranks of the mp_group.

    Only hashes travel; the whole list of them only when something differs.

    Raises:
        TraceError: on every rank alike, naming the first difference, the rank that has
            it and the rank it was compared with.
    """
    if session.mp_size() == 1:
        return
    mine = (step, first_channel, graph.fingerprint())
    others = session.allgather(mine, session.MP_GROUP)
    if all(other == mine for other in others):
        return
    ranks = session.get_mp_group()
    digests = session.allgather((step, graph.digests()), session.MP_GROUP)
    raise TraceError(_first_difference(ranks, digests))


def agree_on_profile(
    graph: Graph, mine: Profile | None, group: session.CommGroup = session.MP_GROUP
) -> Profile | None:
    """The profile of the first rank of ``group`` that has one, in the names that layers
    have here. The graphs of the ranks are the same but for names."""
    paths = {path: str(i) for i, path in enumerate(layer_paths(graph))}
    numbered = None if mine is None else mine.renamed(paths)
    every = session.allgather(numbered, group)
    if len(every) == 1:
        return mine
    found = [each for each in every if each is not None]
    names = {number: path for path, number in paths.items()}
    return found[0].renamed(names) if found else None


def require_same_partition(step: str, plan: StepPlan) -> None:
    """Compare where the variables are with the other ranks of the dp_group, which have
    the same variables if the replicas of the model are partitioned alike.

    Raises:
        PartitionError: on every rank alike, if they are not.
    """
    owners = sorted(plan.owner.items())
    found = session.allgather((step, owners), session.DP_GROUP)
    if all(each == found[0] for each in found):
        return
    each = "; ".join(
        f"rank {rank}: step={name!r} variables={len(owner)}"
        f" on this partition={sum(p == session.pp_rank() for _, p in owner)}"
        for rank, (name, owner) in zip(session.get_dp_group(), found, strict=True)
    )
    raise PartitionError(
        "with horovod: true all replicas of a model must be partitioned alike, for"
        f" their gradients are averaged: {each}; run the same code with batches of the"
        " same shape on all of them, or give them a partition_file"
    )


def _first_difference(
    ranks: Sequence[int], digests: Sequence[tuple[str, tuple[tuple[str, str], ...]]]
) -> str:
    """The error text; the others are held against the first rank of the group."""
    rule = "all ranks of an mp_group must trace the same step"
    remedy = (
        "; the ranks run different code, shapes or versions, or call their steps in a"
        " different order"
    )
    reference_step, reference = digests[0]
    for rank, (step, rows) in zip(ranks[1:], digests[1:], strict=True):
        where = f"rank {rank} differs from rank {ranks[0]}"
        if step != reference_step:
            return f"{rule}: {where}: step={step!r} and {reference_step!r}{remedy}"
        for (what, digest), (expected, expected_digest) in zip(rows, reference):
            if digest != expected_digest and what != expected:
                found = f"{what} instead of {expected}"
                return f"{rule}: step={step!r}: {where}: {found}{remedy}"
            if digest != expected_digest:
                return (
                    f"{rule}: step={step!r}: {where} in the attributes, inputs or layer"
                    f" of {what}{remedy}"
                )
        if len(rows) != len(reference):
            longer = max(rows, reference, key=len)
            extra = longer[min(len(rows), len(reference))][0]
            return (
                f"{rule}: step={step!r}: {where}: only one of them has {extra}{remedy}"
            )
    return f"{rule}: step={reference_step!r}: their channel numbers differ{remedy}"
