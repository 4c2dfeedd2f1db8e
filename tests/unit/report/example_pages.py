"""Pages of plans that are literals, for what TensorFlow's models rarely have."""

import dataclasses

from smp_tf.config import resolve
from smp_tf.plan.forecast import Forecast, forecast
from smp_tf.plan.graph import Graph
from smp_tf.plan.plan_step import plan_step
from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.plan_page import plan_page
from tests.unit.plan.example_graphs import Builder, chain


def planned(graph: Graph, partitions: int, **config: object) -> StepPlan:
    wanted = {"partitions": partitions, "microbatches": 4, **config}
    return plan_step(graph, resolve(wanted, partitions), {}, {})


def forecast_of(graph: Graph, partitions: int, **config: object) -> Forecast:
    return forecast([planned(graph, partitions, **config)])


def renamed(graph: Graph, name: str) -> Graph:
    """Layers ``dense_<i>`` with a name in which {} is the number."""
    nodes = tuple(
        (
            dataclasses.replace(
                node, layer="model/" + name.format(node.layer.rpartition("_")[2])
            )
            if node.layer
            else node
        )
        for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=nodes)


def hostile_names() -> str:
    return plan_page(forecast_of(renamed(chain(4), '<b>&"{}"'), 2))


def skipping() -> str:
    """Three layers on a partition each; the last one reads what the first one made."""
    b = Builder()
    x, first = b.dense("first", b.argument("x"), b.variable("w0"))
    y, second = b.dense("second", x, b.variable("w1"))
    joined = b.op("join", "AddV2", x, y, layer="model/third")
    z, third = b.dense("third", joined, b.variable("w2"))
    _, grad = b.mean_loss(z)
    grad, dw = b.dense_backward(third, grad)
    b.gradient(dw, 2)
    dx, dw = b.dense_backward(second, grad)
    b.gradient(dw, 1)
    total = b.backward("grad/sum", "AddN", grad, dx)
    b.gradient(b.dense_backward(first, total, needs_input=False)[1], 0)
    return plan_page(forecast_of(b.build(), 3))
