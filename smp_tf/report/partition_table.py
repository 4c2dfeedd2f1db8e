"""The partition table: what each partition holds, costs and sends."""

from collections.abc import Sequence

from smp_tf.plan.cost import Cost
from smp_tf.plan.memory import memory_by_rank
from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.columns import aligned

_HEADER = (
    "partition",
    "layers",
    "variables",
    "weight bytes",
    "peak bytes",
    "compute share",
    "cut bytes",
)


def partition_table(plan: StepPlan) -> str:
    """One line per partition, and one for the whole model.

    Weight bytes are those of the variables; peak bytes are all that the rank's tensors
    take at its fullest moment in this schedule: weights, gradients, the two slots of
    Adam, activations of all microbatches in flight, what the optimizer's update takes
    beyond that, and what the allocator loses (see ``plan.memory``). Compute share is
    estimated, or measured if there is a profile; cut bytes leave the partition per
    microbatch, forward and backward. An unknown dimension, as of a batch in an
    ``input_signature``, counts as 1.
    """
    whole = sum(plan.costs, Cost())
    rows: list[Sequence[str]] = [_HEADER]
    owner, memory = plan.owner, memory_by_rank(plan)
    for partition in range(plan.num_partitions):
        atoms = [
            i for i, chosen in enumerate(plan.partition_of_atom) if chosen == partition
        ]
        cost = sum((plan.costs[i] for i in atoms), Cost())
        names = [layer for i in atoms for layer in plan.atoms.atoms[i].layers]
        cut = sum(c.spec.num_bytes for c in plan.segments.cuts if c.source == partition)
        rows.append(
            (
                str(partition),
                _span(names),
                str(sum(p == partition for p in owner.values())),
                f"{cost.weight_bytes:,}",
                f"{memory[partition].total:,}",
                f"{100 * cost.seconds / (whole.seconds or 1.0):.1f} %",
                f"{cut:,}",
            )
        )
    layers = {layer for atom in plan.atoms.atoms for layer in atom.layers}
    rows.append(
        (
            "all",
            f"{len(layers)} layers",
            str(len(owner)),
            f"{whole.weight_bytes:,}",
            f"{sum(each.total for each in memory):,}",
            "100.0 %",
            f"{sum(c.spec.num_bytes for c in plan.segments.cuts):,}",
        )
    )
    return _align(rows)


def _span(layers: Sequence[str]) -> str:
    """First and last layer, without the model's own name."""
    names = list(dict.fromkeys(layer.partition("/")[2] or layer for layer in layers))
    if len(names) <= 2:
        return ", ".join(names)
    return f"{names[0]} .. {names[-1]} ({len(names)})"


def _align(rows: Sequence[Sequence[str]]) -> str:
    lines = aligned(rows, left=(1,))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.insert(len(lines) - 1, lines[1])
    return "\n".join(lines)
