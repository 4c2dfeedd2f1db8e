"""Measure a step before it is partitioned: its atoms, one after the other, here.

    group of atoms   0    1    2  ..  n        each a function, forward and backward
    forward          |--> |--> |--> .. |-->    \\  one real microbatch; each is warmed
    backward      <--|  <--| ..  <--| <--|     /   up, then repeated; the fastest counts

The step is cut as for ranks that hold a group each. A group's variables exist while its
function runs: stand-ins with the values that the model's variables have, or would get.
So the peak is the largest group and the activations of one microbatch, and whatever the
step writes (moving averages, a metric, a counter) is written to stand-ins. Generators
of random numbers are put back. What an operation does outside of TensorFlow (``print``,
``py_function``) does happen, once for each repeat.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend import variables
from smp_tf.frontend.hooks import graphs, initial_values
from smp_tf.frontend.trace import StepTrace
from smp_tf.plan.atoms import Atoms, find_atoms
from smp_tf.plan.cost import atom_costs
from smp_tf.plan.graph import Graph, node_of
from smp_tf.plan.pipeline import Kind
from smp_tf.plan.profile import Profile, group_atoms, measured_profile
from smp_tf.plan.roles import Roles, assign_roles
from smp_tf.plan.segment import Segment, SegmentPlan, split_segments
from smp_tf.runtime import session
from smp_tf.runtime.agree import agree_on_profile
from smp_tf.runtime.arguments import Arguments, Feed, TensorArgument
from smp_tf.runtime.link_times import measure_links
from smp_tf.runtime.lower import lower_segments, noinline

logger = logging.getLogger("smp_tf")

LEAST_REPEATS, MOST_REPEATS = 3, 30
ENOUGH_SECONDS = 0.03
"""A segment runs until it has taken so long, but within these numbers: the time of a
short one is hidden in that of the call, and needs more tries to be seen."""

LEAST_SECONDS = 1e-6
"""Of a segment that is not longer than an empty one, as far as can be seen."""

_SHOWN = 1000  # characters of an error: TensorFlow writes pages


def measure(trace: StepTrace, arguments: Arguments, num_microbatches: int) -> Profile:
    """Run the first microbatch of ``arguments`` group by group.

    A variable without a value yet gets, for its stand-in, the one that it would get:
    what a layer takes can depend on it (a router, a loop), and the initializer is
    traced already. It runs once for the forward and once for the backward.

    Symbolic arguments (the step is called inside a ``tf.function``) are made up from
    their shapes: zeros for integers, which are valid as indices and labels, and normal
    numbers.

    Raises:
        SmpError: the step cannot be run like this; says why.
    """
    graph = trace.graph
    _require_stand_ins(graph)
    roles = assign_roles(graph)
    atoms = find_atoms(graph, roles)
    groups = group_atoms(graph, atoms)
    plan = _cut(graph, roles, atoms, groups)
    state = initial_values.RandomState()
    with graphs.outside_of_graphs(), graphs.without_tapes():
        fed = dict(
            zip(graph.arguments, _microbatch(arguments, num_microbatches), strict=True)
        )
        try:
            seconds = _Runner(trace, plan, fed).run()
        finally:
            state.restore()
    forward = [0.0] * (plan.num_partitions - 1)
    backward = list(forward)
    for segment, each in zip(plan.segments, seconds, strict=True):
        if segment.partition:
            phase = forward if segment.kind is Kind.F else backward
            phase[segment.partition - 1] += each
    costs = atom_costs(graph, roles, atoms)
    return measured_profile(atoms, costs, groups, forward, backward)


def profile_of_step(
    step: str,
    trace: StepTrace,
    arguments: Arguments,
    known: Profile | None,
    num_microbatches: int,
) -> Profile | None:
    """The profile that a step of a job is planned with; the same on all ranks.

    That is what its models were partitioned with, else what ``model.profile`` has
    measured, else with ``profile: true`` what the first rank of the mp_group measures
    now, and the others wait for, ``timeout_s`` at most. If it cannot, it says why and
    all use estimates. To a profile belong the links between the ranks, which measure
    them together. With Horovod all replicas plan with what the first one has found.

    Args:
        known: of the earlier steps of the models.
    """
    is_first = any(model.placement is None for model in trace.models)
    if not is_first and known is None:
        return None
    config = session.config()
    found = known or profile_of_models(trace.models)
    is_wanted = config.profile and config.partitions > 1
    if found is None and is_wanted and session.mp_rank() == 0:
        found = _measure_or_warn(step, trace, arguments, num_microbatches)
    agreed = agree_on_profile(trace.graph, found)
    if agreed is not None and not agreed.links and session.pp_size() > 1:
        agreed = dataclasses.replace(agreed, links=measure_links())
    if is_first and config.horovod:
        agreed = agree_on_profile(trace.graph, agreed, session.DP_GROUP)
    return agreed


def profile_of_models(models: Sequence[Any]) -> Profile | None:
    """What ``model.profile`` has measured of any of them."""
    found: Profile | None = None
    for model in models:
        if model.measured is not None:
            found = model.measured if found is None else found + model.measured
    return found


def _measure_or_warn(
    step: str, trace: StepTrace, arguments: Arguments, num_microbatches: int
) -> Profile | None:
    begin = time.perf_counter()
    try:
        found = measure(trace, arguments, num_microbatches)
    except Exception as error:  # whatever it is: the step can run without a profile
        logger.warning(
            "profile: the step is planned with estimates, for it could not be measured:"
            " step=%s rank=%d: %s: %s",
            step,
            session.rank(),
            type(error).__name__,
            str(error)[:_SHOWN],
        )
        return None
    if session.rank() == 0:
        spent = time.perf_counter() - begin
        logger.info("profile of step=%s: %r in %.1f s", step, found, spent)
    return found


def _require_stand_ins(graph: Graph) -> None:
    """What the step changes must be variables, or profiling would change it too."""
    for node in graph.nodes:
        for tensor in node.writes:
            name = node_of(tensor)
            if name in graph.captures and name not in graph.variable_of:
                raise SmpError(
                    "a step that changes something else than variables cannot be"
                    f" profiled: operation={node.name!r} ({node.op})"
                    f" layer={node.layer!r}"
                )


def _cut(
    graph: Graph, roles: Roles, atoms: Atoms, group_of_atom: Sequence[int]
) -> SegmentPlan:
    """Each group as a partition, behind partition 0: what runs on every rank, which no
    atom is charged for."""
    outside = len(atoms.atoms)
    atom_of = {**atoms.atom_of, **dict.fromkeys(sorted(roles.everywhere), outside)}
    return split_segments(
        graph,
        dataclasses.replace(roles, everywhere=frozenset()),
        dataclasses.replace(atoms, atom_of=atom_of),
        [*(group + 1 for group in group_of_atom), 0],
        max(group_of_atom) + 2,
        {},
    )


# --- running --------------------------------------------------------------------------


class _Runner:
    """Runs all segments of a plan once, for their times."""

    def __init__(
        self, trace: StepTrace, plan: SegmentPlan, fed: Mapping[str, tf.Tensor]
    ) -> None:
        self._plan, self._graph = plan, trace.graph
        self._made = dict(fed)
        self._originals: dict[str, tf.Variable] = {
            name: trace.variables[index]
            for name, index in trace.graph.variable_of.items()
        }
        self._stand_ins = {
            name: _stand_in(variable) for name, variable in self._originals.items()
        }
        handles = {name: each.handle for name, each in self._stand_ins.items()}
        replaced = dataclasses.replace(trace, captured={**trace.captured, **handles})
        self._functions = lower_segments(replaced, plan.segments)
        self._last_use = {
            tensor: segment.stage
            for segment in plan.segments
            for tensor in (*segment.inputs, *segment.arguments)
        }

    def run(self) -> list[float]:
        """Seconds of each segment, without those of calling a function at all."""
        nothing = noinline(lambda x: [tf.identity(x)], [tf.TensorSpec([], tf.float32)])
        zero = tf.zeros([])
        overhead, _ = _time(lambda: nothing(zero))
        return [
            max(self._run(segment) - overhead, LEAST_SECONDS)
            for segment in self._plan.segments
        ]

    def _run(self, segment: Segment) -> float:
        ((_, function),) = self._functions.pop(segment.stage)
        values = [self._made[name] for name in (*segment.inputs, *segment.arguments)]
        names = self._used(segment)
        for name in names:
            value = variables.value_of(self._originals[name])
            initial_values.assign_raw(self._stand_ins[name], value)
            del value
        seconds, outputs = _time(lambda: function(*values))
        for name in names:
            stand_in = self._stand_ins[name]
            initial_values.assign_raw(stand_in, tf.zeros([0], stand_in.dtype))
        self._made.update(
            (tensor, value)
            for tensor, value in zip(segment.outputs, outputs)
            if self._last_use.get(tensor, -1) > segment.stage
        )
        for tensor in [*segment.inputs, *segment.arguments]:
            if self._last_use[tensor] == segment.stage:
                del self._made[tensor]
        return seconds

    def _used(self, segment: Segment) -> list[str]:
        """Placeholders of its variables. A loop hands on the resource of a variable, so
        that its backward reads it without having captured it."""
        found = dict.fromkeys(segment.captures)
        tensors = list(segment.inputs)
        while tensors:
            tensor = tensors.pop()
            if self._graph.spec(tensor).dtype == "resource":
                name = node_of(tensor)
                found.setdefault(name)
                tensors += self._graph.by_name[name].inputs
        return [name for name in found if name in self._stand_ins]


def _stand_in(variable: tf.Variable) -> Any:
    with tf.device(variable.handle.device):
        return initial_values.UninitializedVariable(
            shape=variable.shape, dtype=variable.dtype, trainable=False
        )


def _time(call: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest time of a call, after one that warms up; and what it gave."""
    outputs = call()
    wait = _wait_for_devices()
    shortest, spent = float("inf"), 0.0
    for repeat in range(MOST_REPEATS):
        if repeat >= LEAST_REPEATS and spent > ENOUGH_SECONDS:
            break
        del outputs
        wait()
        begin = time.perf_counter()
        outputs = call()
        wait()
        seconds = time.perf_counter() - begin
        shortest, spent = min(shortest, seconds), spent + seconds
    return shortest, outputs


def _wait_for_devices() -> Callable[[], None]:
    """A GPU is given work and left alone with it; a CPU is not."""
    if tf.config.list_physical_devices("GPU"):
        wait: Callable[[], None] = tf.test.experimental.sync_devices
        return wait
    return lambda: None


# --- one microbatch -------------------------------------------------------------------


def _microbatch(arguments: Arguments, count: int) -> Iterator[tf.Tensor]:
    """The first one's tensor for each argument."""
    given = iter(arguments.values)
    for argument in arguments.tensors:
        value = next(given)
        if argument.feed is Feed.SLICED:
            for _ in range(count - 1):
                next(given)
        if tf.is_symbolic_tensor(value):
            yield _made_up(argument)
        elif argument.feed is Feed.SPLIT and count > 1:
            size = value.shape[argument.axis] // count
            yield tf.gather(value, tf.range(size), axis=argument.axis)
        else:
            yield value


def _made_up(argument: TensorArgument) -> tf.Tensor:
    spec = argument.microbatch
    if not spec.shape.is_fully_defined():
        raise SmpError(
            "inside a tf.function a step can be profiled only if all shapes are known:"
            f" argument={argument.name!r} shape={spec.shape}; call step.plan(..) with a"
            " real batch before, or model.profile(inputs)"
        )
    if spec.dtype.is_floating or spec.dtype.is_complex:
        numbers = np.random.default_rng(0).standard_normal(spec.shape.as_list())
        return tf.cast(numbers, spec.dtype)
    return tf.zeros(spec.shape, spec.dtype)
