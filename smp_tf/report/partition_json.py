"""The partition table as one JSON object, for ``SMP_LOG_JSON``."""

import dataclasses
from typing import Any

from smp_tf.plan.cost import Cost
from smp_tf.plan.forecast import cut_tensors
from smp_tf.plan.memory import memory_by_rank
from smp_tf.plan.step_plan import StepPlan


def partition_event(step: str, plan: StepPlan, time: str) -> dict[str, Any]:
    """What ``partition_table`` shows and what crosses ranks, without rounding.

    Seconds and shares are estimates, or measured if there is a profile; bytes of cut
    tensors are those of a whole step.
    """
    return {
        "event": "partition",
        "time": time,
        "step": step,
        "partitions": plan.num_partitions,
        "microbatches": plan.num_microbatches,
        "pipeline": plan.pipeline,
        "seconds": plan.report.seconds,
        "bubble": plan.report.bubble,
        "ranks": _ranks(plan),
        "cuts": [dataclasses.asdict(each) for each in cut_tensors(plan)],
    }


def _ranks(plan: StepPlan) -> list[dict[str, Any]]:
    seconds = sum(plan.costs, Cost()).seconds or 1.0
    found = []
    for rank, memory in enumerate(memory_by_rank(plan)):
        own = [i for i, chosen in enumerate(plan.partition_of_atom) if chosen == rank]
        layers = [layer for i in own for layer in plan.atoms.atoms[i].layers]
        found.append(
            {
                "rank": rank,
                "layers": list(dict.fromkeys(layers)),
                "weight_bytes": memory.weights,
                "gradient_bytes": memory.gradients,
                "optimizer_bytes": memory.optimizer,
                "activation_bytes": memory.activations,
                "update_bytes": memory.update,
                "allocator_bytes": memory.allocator,
                "total_bytes": memory.total,
                "compute_share": sum(plan.costs[i].seconds for i in own) / seconds,
            }
        )
    return found
