"""From a step function to a plain Graph: attribution, fingerprint, errors."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.frontend.hooks import recording
from smp_tf.frontend.trace import StepTrace, trace_step
from smp_tf.plan.graph import Graph
from smp_tf.plan.plan_step import plan_step
from smp_tf.plan.roles import assign_roles, touched_variables, written_variables
from smp_tf.plan.step_plan import StepPlan
from tests.models import CASES, STEPS, loss_of
from tests.unit.one_process import session


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with session():
        yield


def trace(function: Any, *tensors: Any, **options: Any) -> StepTrace:
    specs = [tf.type_spec_from_value(tf.convert_to_tensor(t)) for t in tensors]
    return trace_step(function, specs, lambda f, given: f(*given), **options)


def planned(graph: Graph, partitions: int) -> StepPlan:
    config = dataclasses.replace(smp.config(), partitions=partitions, microbatches=2)
    return plan_step(graph, config, {}, {})


def graph_of(case: str, style: str) -> Graph:
    model = CASES[case].build(smp.DistributedModel)
    return smp.step(STEPS[style](model)).plan(*CASES[case].data(4)).graph


class Tiny(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__(name="tiny")
        self.dense = tf.keras.layers.Dense(3, name="dense")
        self.head = tf.keras.layers.Dense(2, name="head")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.head(tf.tanh(self.dense(x)))


# --- attribution ----------------------------------------------------------------------


@pytest.mark.parametrize("style", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_every_backward_operation_runs_where_its_forward_does(
    case: str, style: str
) -> None:
    graph = graph_of(case, style)
    plan = planned(graph, 2)
    of, recorded = plan.atoms.atom_of, 0
    backward = [n for n in graph.nodes if n.name in plan.roles.backward]
    assert len(backward) > 30
    for node in backward:
        if not plan.roles.is_placed(node.name):
            continue
        assert node.name in of, f"{node.name} ({node.op}) has no place"
        recorded += bool(node.forward)
        if node.forward and not touched_variables(graph, node):
            forward = graph.by_name[node.forward].name
            if forward in of:
                assert of[node.name] == of[forward], node
    placed = sum(plan.roles.is_placed(node.name) for node in backward)
    assert recorded > 0.6 * placed, f"{recorded} of {placed} know their forward"


@pytest.mark.parametrize(
    "case, partitions, visits",
    [
        ("mlp", 2, "F0 F1 B1 B0"),
        ("mlp", 3, "F0 F1 F2 B2 B1 B0"),
        ("conv", 2, "F0 F1 B1 B0"),
        ("transformer", 2, "F0 F1 F0 B0 B1 B0"),
    ],
)
@pytest.mark.parametrize("style", STEPS)
def test_models_are_cut_where_they_should_be(
    case: str, partitions: int, visits: str, style: str
) -> None:
    """A single misplaced gradient operation would add segments or cuts."""
    plan = planned(graph_of(case, style), partitions)
    segments = plan.segments.segments
    assert " ".join(f"{s.kind.value}{s.partition}" for s in segments) == visits
    if case != "transformer":
        returned = set(plan.graph.returns)
        links = [
            (c.source, c.peer) for c in plan.segments.cuts if c.tensor not in returned
        ]
        assert len(links) == len(set(links)) == 2 * (partitions - 1)


def test_layers_forward_and_gradients_are_described() -> None:
    model = Tiny()

    def step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    found = trace(step, tf.zeros([4, 5]))
    graph = found.graph
    layers = {node.layer for node in graph.nodes}
    assert layers == {"", "tiny", "tiny/dense", "tiny/head"}
    names = ["dense/kernel", "dense/bias", "head/kernel", "head/bias"]
    assert [v.name for v in graph.variables] == [f"tiny/{name}:0" for name in names]
    assert all(v.in_model and v.trainable for v in graph.variables)
    assert [str(v.spec) for v in graph.variables] == [
        "float32[5, 3]", "float32[3]", "float32[3, 2]", "float32[2]",
    ]  # fmt: skip
    assert [graph.gradient_of.get(tensor) for tensor in graph.returns] == [
        0, 1, 2, 3, None,
    ]  # fmt: skip
    assert len(graph.losses) == 1 and graph.by_name[graph.losses[0][:-2]].op == "Mean"
    assert len(graph.arguments) == 1 and str(graph.spec(graph.arguments[0])) == (
        "float32[4, 5]"
    )
    assert list(found.variables) == model.global_variables
    assert found.models == (model,)
    assert set(found.captured) == set(graph.captures)


def test_the_loss_need_not_be_returned() -> None:
    model = Tiny()

    def step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    plan = planned(trace(step, tf.zeros([4, 5])).graph, 2)
    kinds = [s.kind.value for s in plan.segments.segments]
    assert kinds == ["F", "F", "B", "B"]


def test_metrics_and_other_variables_follow_those_of_the_model() -> None:
    model = Tiny()
    metrics = [tf.keras.metrics.Mean(name=f"mean_{i}") for i in range(4)]

    def step(x: tf.Tensor) -> Any:
        y = model(x)
        for metric in metrics:
            metric.update_state(y)
        return y

    graph = trace(step, tf.zeros([4, 5])).graph
    assert [v.in_model for v in graph.variables] == [True] * 4 + [False] * 8
    # in order of use, not of a set: total and count of each metric, one after the other
    handles = [v.placeholder for v in graph.variables[4:]]
    assert handles == [name for name in graph.captures if name in handles]
    assert len(graph.effects) >= 8


# --- fingerprint ----------------------------------------------------------------------

_FINGERPRINT = """
import sys
import smp_tf as smp
import tensorflow as tf
from tests.models import CASES, loss_of

for _ in range(int(sys.argv[1])):
    tf.keras.layers.Dense(1), tf.keras.metrics.Mean()
    tf.keras.Sequential([tf.keras.layers.Dense(2)])(tf.zeros([1, 2]))
    tf.function(lambda x: tf.cond(x > 0, lambda: x, lambda: -x))(tf.ones([]))

class Recurrent(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.rnn = tf.keras.layers.Bidirectional(tf.keras.layers.LSTM(4))

    def call(self, x, training=None):
        _, x = tf.while_loop(
            lambda i, x: i < 3, lambda i, x: (i + 1, tf.tanh(x)), [0, x]
        )
        x = tf.switch_case(tf.size(x) % 2, [lambda: x, lambda: x * 2.0])
        return self.rnn(x)

smp.init({"partitions": 1})
for name, case in CASES.items():
    model = case.build(smp.DistributedModel)
    metrics = {name: tf.keras.metrics.Mean() for name in "abcdef"}

    @smp.step
    def step(x, y):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = loss_of(y, outputs)
        for metric in metrics.values():
            metric.update_state(loss)
        lstm = tf.while_loop(lambda i: i < 3, lambda i: i + 1, [0])
        gradients = tape.gradient(loss, model.trainable_variables)
        return {v.name: g for v, g in zip(model.trainable_variables, gradients)}, lstm

    print(name, step.plan(*case.data(4)).graph.fingerprint())

model = Recurrent()

@smp.step
def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x))
    return tape.gradient(loss, model.trainable_variables)

print("recurrent", step.plan(tf.ones([4, 3, 2])).graph.fingerprint())
"""


def test_fingerprints_are_equal_in_processes_with_other_hashes_and_names() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _FINGERPRINT, str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.getcwd()},
        )
        for seed in (0, 3)
    ]
    outputs = [run.communicate(timeout=100) for run in runs]
    for run, (_, errors) in zip(runs, outputs):
        assert run.returncode == 0, errors[-3000:]
    first, second = (output.splitlines() for output, _ in outputs)
    assert len(first) == len(CASES) + 1 and first == second
    assert len({line.split()[1] for line in first}) == len(first)


def test_fingerprints_differ_where_the_step_does() -> None:
    model = Tiny()
    x = tf.zeros([4, 5])

    def repeated(y: tf.Tensor, change: float) -> tf.Tensor:
        return tf.while_loop(lambda y: y[0, 0] < 9.0, lambda y: (y + change,), [y])

    steps = {
        "plain": lambda x: model(x),
        "constant": lambda x: model(x) + 1.0,
        "other constant": lambda x: model(x) + 2.0,
        "operation": lambda x: tf.tanh(model(x)),
        "attribute": lambda x: tf.reduce_sum(model(x), keepdims=True),
        "no attribute": lambda x: tf.reduce_sum(model(x)),
        "returns": lambda x: (model(x), x),
        "two returns": lambda x: [model(x)] * 2,
        "loop": lambda x: repeated(model(x), 1.0),
        "loop with another body": lambda x: repeated(model(x), 2.0),
    }
    prints = {name: trace(f, x).graph.fingerprint() for name, f in steps.items()}
    prints["shape"] = trace(steps["plain"], tf.zeros([2, 5])).graph.fingerprint()
    assert len(set(prints.values())) == len(prints), prints
    assert trace(steps["plain"], x).graph.fingerprint() == prints["plain"]


def test_seeds_do_not_count() -> None:
    model = Tiny()

    def step(seed: int) -> str:
        function = lambda x: model(x) + tf.random.normal([2], seed=seed)  # noqa: E731
        return trace(function, tf.zeros([4, 5])).graph.fingerprint()

    assert step(1) == step(2)


# --- errors ---------------------------------------------------------------------------


def test_a_step_without_a_model() -> None:
    def lonely(x: tf.Tensor) -> tf.Tensor:
        return x * 2.0

    with pytest.raises(smp.TraceError, match=r"step=lonely called none.*tf\.function"):
        trace(lonely, tf.zeros([4, 5]))


@pytest.mark.parametrize("returned", ["input", "nothing", "constant", "python"])
def test_a_result_that_does_not_depend_on_the_model(returned: str) -> None:
    model = Tiny()

    def forgetful(x: tf.Tensor) -> Any:
        model(x)
        results = {"input": x + 1.0, "constant": tf.ones(2), "python": 3}
        return results.get(returned)

    with pytest.raises(smp.TraceError, match="must depend on the output.*=forgetful"):
        trace(forgetful, tf.zeros([4, 5]))


def test_a_tensor_of_the_function_around() -> None:
    model = Tiny()

    @tf.function
    def outer(scale: tf.Tensor) -> Any:
        def inner(x: tf.Tensor) -> Any:
            return model(x) * scale

        return trace(inner, tf.zeros([4, 5]))

    with pytest.raises(smp.TraceError, match=r"=inner.*'scale:0'.*non_split_inputs"):
        outer(tf.constant(2.0))


def test_eager_tensors_from_outside_are_constants() -> None:
    model, scale = Tiny(), tf.fill([100, 2], 2.0)
    graph = trace(lambda x: model(x) * scale[:4], tf.zeros([4, 5])).graph
    assert len(graph.captures) == 5


def test_after_an_error_the_next_trace_works() -> None:
    model = Tiny()

    def failing(x: tf.Tensor) -> Any:
        model(x)
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        trace(failing, tf.zeros([4, 5]), autograph=False)
    assert not recording.is_tracing()
    trace(lambda x: model(x), tf.zeros([4, 5]))


def test_tracing_works_while_another_function_is_traced() -> None:
    model = Tiny()
    found = []

    @tf.function
    def outer(x: tf.Tensor) -> Any:
        def step(x: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                loss = loss_of(tf.zeros([4], tf.int32), model(x))
            return tape.gradient(loss, model.trainable_variables)

        with tf.GradientTape():
            found.append(trace(step, tf.zeros([4, 5])))
        return x

    outer(tf.constant(1.0))
    assert len(found[0].graph.gradient_of) >= 4
    assert all(leaf.variable is not None for leaf in found[0].returns.leaves)


# --- what is trained, and what is written ---------------------------------------------


def test_a_frozen_layer_is_not_trained() -> None:
    """Its variables go on saying that they are trainable."""
    model = Tiny()
    model.dense.trainable = False
    graph = trace(model, tf.ones([2, 4])).graph
    assert [(v.name, v.trainable) for v in graph.variables] == [
        ("tiny/dense/kernel:0", False), ("tiny/dense/bias:0", False),
        ("tiny/head/kernel:0", True), ("tiny/head/bias:0", True),
    ]  # fmt: skip
    assert all(v.trainable for v in model.dense.variables + model.head.variables)


class Looping(smp.DistributedModel):
    """A weight, a state of its own and a counter from outside, used by a loop."""

    def __init__(self, counter: tf.Variable, how: str) -> None:
        super().__init__(name="looping")
        self.dense = tf.keras.layers.Dense(4, name="dense")
        self.seen = tf.Variable(0, trainable=False, name="seen")
        self.__dict__["counter"], self.how = counter, how

    def call(self, x: tf.Tensor) -> tf.Tensor:
        y = self.dense(x)
        for _ in tf.range(3):
            y = tf.matmul(y, self.dense.kernel)
            if self.how == "writes its own" and tf.reduce_sum(y) > 0:
                self.seen.assign_add(1)
            elif self.how == "writes the counter":
                self.counter.assign_add(1)
            elif self.how == "reads":
                y = y * tf.cast(self.counter + self.seen, tf.float32)
        return y


@pytest.mark.parametrize(
    "how, written",
    [
        ("reads", []),
        ("writes its own", ["seen:0"]),
        ("writes the counter", ["counter:0"]),
    ],
)
def test_loops_write_what_their_bodies_write(how: str, written: list[str]) -> None:
    counter = tf.Variable(0, trainable=False, name="counter")
    model = Looping(counter, how)
    graph = trace(model, tf.ones([2, 4])).graph
    (loop,) = [node for node in graph.nodes if node.op.endswith("While")]
    used = {graph.variables[i].name for i in touched_variables(graph, loop)}
    assert {"looping/dense/kernel:0", *written} <= used
    found = [graph.variables[i].name for i in written_variables(graph, loop)]
    assert found == written


def test_a_gradient_loop_writes_nothing() -> None:
    model = Looping(tf.Variable(0, trainable=False), "reads")

    def step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        return tape.gradient(loss, model.trainable_variables)

    graph = trace(step, tf.ones([2, 4])).graph
    loops = [node for node in graph.nodes if node.op.endswith("While")]
    assert len(loops) == 2 and not any(node.writes for node in loops)
    assert "looping/dense/kernel:0" in {
        graph.variables[i].name for i in assign_roles(graph).variable_of_read.values()
    }
