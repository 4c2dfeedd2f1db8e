"""``@smp.step``: trace, plan, emit and call. The only module that knows the whole chain."""

import dataclasses
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.errors import ConfigError
from smp_tf.frontend import hooks
from smp_tf.frontend.returns import Leaf
from smp_tf.frontend.trace import StepTrace, trace_step
from smp_tf.plan.program import lower_program, num_channels
from smp_tf.plan.step_plan import StepPlan, plan_step
from smp_tf.runtime import placement, session
from smp_tf.runtime.agree import require_same_graph
from smp_tf.runtime.arguments import Arguments, SplitRules, read_arguments
from smp_tf.runtime.emit import Emitted, EmitInputs, emit
from smp_tf.runtime.lower import lower_segments
from smp_tf.runtime.step_output import StepOutput

logger = logging.getLogger("smp_tf")

_TF_FUNCTION_ARGUMENTS = ("autograph", "reduce_retracing", "jit_compile")
_building = threading.RLock()  # a step is traced by one thread at a time


def step(
    function: Callable[..., Any] | None = None,
    *,
    non_split_inputs: Sequence[str] = (),
    input_split_axes: Mapping[str, int] | None = None,
    input_signature: Sequence[Any] | None = None,
    **tf_function_arguments: Any,
) -> Any:
    """Decorate a function that does one forward and backward pass, or one forward pass.

    The function is traced once for one microbatch, cut into the partitions of the mp_group, and
    run in a pipeline over microbatches. Call it as a plain function, eagerly or inside a
    ``tf.function``, on every rank with the same arguments.

    Args:
        non_split_inputs: names of parameters that every microbatch gets whole.
        input_split_axes: parameter name -> axis to split along, where it is not 0.
        input_signature: TensorSpecs of the positional arguments, as in ``tf.function``.
        **tf_function_arguments: ``autograph``; ``reduce_retracing`` is accepted and needs
            nothing (a new shape reuses the partition).

    Returns:
        A callable that returns the function's structure, with a ``StepOutput`` in place of
        each tensor. Gradients of variables that other partitions own are left out of lists,
        and None in dicts.

    Raises:
        ConfigError: unknown arguments or parameter names.
    """
    if function is None:
        return functools.partial(
            step,
            non_split_inputs=non_split_inputs,
            input_split_axes=input_split_axes,
            input_signature=input_signature,
            **tf_function_arguments,
        )
    return Step(
        function,
        frozenset(non_split_inputs),
        dict(input_split_axes or {}),
        input_signature,
        tf_function_arguments,
    )


@dataclasses.dataclass(frozen=True)
class _Built:
    """A step for one signature: the plan, and the function of this rank."""

    plan: StepPlan
    trace: StepTrace
    emitted: Emitted
    owner: Mapping[int, int]  # id of a variable's handle -> partition


class Step:
    """A decorated step function. See ``step``."""

    def __init__(
        self,
        function: Callable[..., Any],
        non_split_inputs: frozenset[str],
        input_split_axes: Mapping[str, int],
        input_signature: Sequence[Any] | None,
        tf_function_arguments: Mapping[str, Any],
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._signature = inspect.signature(function)
        self._non_split_inputs = non_split_inputs
        self._input_split_axes = input_split_axes
        self._input_signature = input_signature
        self._autograph = tf_function_arguments.get("autograph", True)
        self._built: dict[Hashable, _Built] = {}
        self._session: Any = None
        self._check_decorator(tf_function_arguments)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: ``self`` is the first argument, a constant of the trace."""
        return self if instance is None else functools.partial(self, instance)

    @tf.autograph.experimental.do_not_convert
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._read(args, kwargs)
        built = self._build(arguments)
        with hooks.without_tapes():
            flat = built.emitted.function(*arguments.values)
        return _Result(built, list(flat or [])).of(built.trace.returns.structure)

    @tf.autograph.experimental.do_not_convert
    def plan(self, *args: Any, **kwargs: Any) -> StepPlan:
        """Trace, partition and schedule for these arguments without running anything.

        Every rank of the mp_group must call it. A later call with the same signature reuses
        all of it. ``print(smp.partition_table(plan))`` shows the partition.
        """
        return self._build(self._read(args, kwargs)).plan

    # -- arguments -------------------------------------------------------------------------------

    def _check_decorator(self, tf_function_arguments: Mapping[str, Any]) -> None:
        unknown = sorted(set(tf_function_arguments) - set(_TF_FUNCTION_ARGUMENTS))
        if unknown:
            raise ConfigError(
                f"smp.step does not know {unknown}: step={self._function.__name__}; known:"
                " non_split_inputs, input_split_axes, input_signature,"
                f" {', '.join(_TF_FUNCTION_ARGUMENTS)}"
            )
        if tf_function_arguments.get("jit_compile"):
            raise NotImplementedError("smp.step: jit_compile is not supported yet")
        parameters = self._signature.parameters.values()
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return
        known = {p.name for p in parameters}
        for option, names in (
            ("non_split_inputs", self._non_split_inputs),
            ("input_split_axes", set(self._input_split_axes)),
        ):
            wrong = sorted(set(names) - known)
            if wrong:
                raise ConfigError(
                    f"{option} must name parameters of the step: step="
                    f"{self._function.__name__} unknown={wrong} parameters={sorted(known)}"
                )

    def _read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        config = session.current(f"step ({self._function.__name__})").config
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        rules = SplitRules(
            config.microbatches, self._non_split_inputs, self._input_split_axes
        )
        names = _positional_names(self._signature, len(bound.args))
        return read_arguments(
            bound.args, bound.kwargs, names, rules, self._aligned_signature(len(bound.args))
        )

    def _aligned_signature(self, count: int) -> Sequence[Any] | None:
        if self._input_signature is None:
            return None
        missing = count - len(self._input_signature)
        if missing < 0:
            raise TypeError(
                f"input_signature has more entries than the call has arguments: step="
                f"{self._function.__name__} entries={len(self._input_signature)}"
                f" arguments={count}"
            )
        has_self = next(iter(self._signature.parameters), "") == "self"
        padding = [None] * missing
        signature = list(self._input_signature)
        return padding + signature if has_self else signature + padding

    # -- building --------------------------------------------------------------------------------

    def _build(self, arguments: Arguments) -> _Built:
        current = session.current("step")
        with _building:
            if self._session is not current:  # built for another session: other ranks
                self._session, self._built = current, {}
            if arguments.key not in self._built:
                self._built[arguments.key] = self._build_new(current, arguments)
            return self._built[arguments.key]

    def _build_new(self, current: Any, arguments: Arguments) -> _Built:
        trace = trace_step(
            self._function,
            [argument.microbatch for argument in arguments.tensors],
            lambda function, tensors: _call(function, arguments, tensors),
            autograph=self._autograph,
        )
        first_channel = _channels.first_free(current)
        require_same_graph(self.__name__, trace.graph, first_channel)
        models = [m for m in trace.models if _is_placed(m)]
        known = placement.owners(models)
        plan = plan_step(
            trace.graph,
            current.config,
            {
                index: known[id(variable.handle)]
                for index, variable in enumerate(trace.variables)
                if id(variable.handle) in known
            },
            placement.layers(models),
        )
        _channels.take(current, num_channels(plan.segments, plan.num_microbatches))
        owner = _place_models(current, trace, plan)
        emitted = self._emit(current, trace, plan, arguments, owner, first_channel)
        return _Built(plan, trace, emitted, owner)

    def _emit(
        self,
        current: Any,
        trace: StepTrace,
        plan: StepPlan,
        arguments: Arguments,
        owner: Mapping[int, int],
        first_channel: int,
    ) -> Emitted:
        pp_rank = session.pp_rank()
        program = lower_program(
            plan.segments, plan.schedule, pp_rank, plan.num_microbatches, first_channel
        )
        mine = [s for s in plan.segments.segments if s.partition == pp_rank]
        return emit(
            EmitInputs(
                graph=trace.graph,
                plan=plan.segments,
                program=program,
                functions=lower_segments(trace, mine),
                arguments=arguments.tensors,
                values=arguments.value_specs,
                sum_returns=_sum_returns(trace, owner, pp_rank),
                peers=tuple(session.get_pp_group()),
            )
        )


class _Channels:
    """Channel numbers of the steps of one session, in the order in which they are built."""

    def __init__(self) -> None:
        self._session: Any = None
        self._next = 0

    def first_free(self, current: Any) -> int:
        if self._session is not current:
            self._session, self._next = current, 0
        return self._next

    def take(self, current: Any, count: int) -> None:
        self._next = self.first_free(current) + count


_channels = _Channels()


def _call(
    function: Callable[..., Any], arguments: Arguments, tensors: Sequence[tf.Tensor]
) -> Any:
    args, kwargs = arguments.rebuild(tensors)
    return function(*args, **kwargs)


def _positional_names(signature: inspect.Signature, count: int) -> list[str]:
    names = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [parameter.name] * (count - len(names))
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names[:count]


def _is_placed(model: Any) -> bool:
    return model.placement is not None and model.placement.is_current()


def _place_models(current: Any, trace: StepTrace, plan: StepPlan) -> dict[int, int]:
    """Tell the models where their variables are; the first time, run what waited for it.

    Returns:
        id of a variable's handle -> partition.
    """
    owner = {id(trace.variables[index].handle): p for index, p in plan.owner.items()}
    is_new = not all(_is_placed(model) for model in trace.models)
    decided = placement.Placement(current, owner, plan.partition_of_layer)
    for model in trace.models:
        if not _is_placed(model):
            model.place(decided)
    if is_new:
        with tf.init_scope():
            placement.run_post_partition_hooks()
    return owner


def _sum_returns(
    trace: StepTrace, owner: Mapping[int, int], pp_rank: int
) -> frozenset[int]:
    """Positions of the dense gradients of this rank's own variables."""
    return frozenset(
        leaf.components[0]
        for leaf in trace.returns.leaves
        if leaf.variable is not None
        and isinstance(leaf.type_spec, tf.TensorSpec)
        and owner.get(id(leaf.variable.handle)) == pp_rank
    )


_REMOTE = object()  # a gradient that another partition has


class _Result:
    """Puts the flat outputs of a call back into the structure that the user returned."""

    def __init__(self, built: _Built, flat: Sequence[tf.Tensor]) -> None:
        self.built, self.flat = built, flat
        self.pp_rank = session.pp_rank()

    def of(self, structure: Any) -> Any:
        result = self._of(structure)
        return None if result is _REMOTE else result

    def _of(self, structure: Any) -> Any:
        if isinstance(structure, Leaf):
            return self._leaf(structure)
        if isinstance(structure, dict):
            return type(structure)((k, self.of(v)) for k, v in structure.items())
        if hasattr(structure, "_fields"):
            return type(structure)(*map(self.of, structure))
        children = [self._of(child) for child in structure]
        return type(structure)(child for child in children if child is not _REMOTE)

    def _leaf(self, leaf: Leaf) -> Any:
        if leaf.variable is not None:
            owner = self.built.owner.get(id(leaf.variable.handle), self.pp_rank)
            if owner != self.pp_rank:
                return _REMOTE
        if not leaf.components:
            return leaf.value
        emitted = self.built.emitted
        outputs = [
            tf.nest.pack_sequence_as(
                leaf.type_spec,
                [self.flat[emitted.returned[c][mb]] for c in leaf.components],
                expand_composites=True,
            )
            for mb in range(self.built.plan.num_microbatches)
        ]
        total = emitted.summed.get(leaf.components[0])
        return StepOutput(outputs, None if total is None else self.flat[total])
