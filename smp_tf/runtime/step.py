"""``@smp.step``: trace, plan, emit and call; the only module that knows them all."""

import copy
import dataclasses
import functools
import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.config import Config
from smp_tf.errors import ConfigError, SmpError
from smp_tf.frontend import variables
from smp_tf.frontend.hooks import graphs
from smp_tf.frontend.trace import StepTrace, trace_step
from smp_tf.plan.piece import PIECE_BYTES, number_pieces, split_segment
from smp_tf.plan.plan_step import plan_step
from smp_tf.plan.program import lower_program, num_channels
from smp_tf.plan.segment import Segment
from smp_tf.plan.step_plan import StepPlan
from smp_tf.plan.sums import group_sums
from smp_tf.runtime import placement, session, timeline_steps, whole_values, xla
from smp_tf.runtime.agree import require_same_graph, require_same_partition
from smp_tf.runtime.arguments import Arguments, SplitRules, read_arguments
from smp_tf.runtime.channels import channels
from smp_tf.runtime.counted_draws import MakeCounter
from smp_tf.runtime.emit import EmitInputs, Emitted, emit
from smp_tf.runtime.log import tell_partition
from smp_tf.runtime.lower import lower_segments
from smp_tf.runtime.profiling import profile_of_step
from smp_tf.runtime.random_counters import counters_of, text_of
from smp_tf.runtime.results import Results, sum_positions

logger = logging.getLogger("smp_tf")

AVERAGED_BYTES = 4 * 2**20
"""Gradients that a piece of a segment makes, where replicas average them: the first are
on their way to the other replicas while the next are made."""

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

    The function is traced once for one microbatch, cut into the partitions of the
    mp_group, and run in a pipeline over microbatches. Call it as a plain function,
    eagerly or inside a ``tf.function``, on every rank with the same arguments.

    Args:
        non_split_inputs: names of parameters that every microbatch gets whole.
        input_split_axes: parameter name -> axis to split along, where it is not 0.
        input_signature: TensorSpecs of the positional arguments, as in ``tf.function``.
        **tf_function_arguments: ``autograph``; ``reduce_retracing`` is accepted and
            needs nothing (a new shape reuses the partition).

    Returns:
        A callable that returns the function's structure, with a ``StepOutput`` in place
        of each tensor. Gradients of variables that other partitions own are left out of
        lists, and None in dicts.

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
    function: Any
    results: Results


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
        # A functools.partial, or any other callable object, has no name of its own.
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._signature = inspect.signature(function)
        self._non_split_inputs = non_split_inputs
        self._input_split_axes = input_split_axes
        self._input_signature = input_signature
        self._autograph = tf_function_arguments.get("autograph", True)
        self._microbatches: int | None = None
        self._forget()
        self._check_decorator(tf_function_arguments)

    def _forget(self) -> None:
        self._built: dict[Hashable, _Built] = {}
        self._session: Any = None

    def with_microbatches(self, count: int) -> "Step":
        """The same step over ``count`` microbatches, whatever the configuration says:
        for a batch that does not divide into as many."""
        other = copy.copy(self)
        other._forget()
        other._microbatches = count
        return other

    def _configured(self, config: Config) -> Config:
        if self._microbatches is None:
            return config
        return dataclasses.replace(config, microbatches=self._microbatches)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: ``self`` is the first argument, a constant of the trace."""
        return self if instance is None else BoundStep(self, instance)

    @graphs.unconverted
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.read(args, kwargs))

    def run(self, arguments: Arguments) -> Any:
        """Build the step for these arguments, if need be, and call it."""
        built = self.build(arguments)
        with graphs.without_tapes():
            flat = built.function(*arguments.values)
        return built.results.of(flat)

    @graphs.unconverted
    def plan(self, *args: Any, **kwargs: Any) -> StepPlan:
        """Trace, partition and schedule for these arguments without running anything.

        Every rank of the mp_group must call it. A later call with the same signature
        reuses all of it. ``print(smp.partition_table(plan))`` shows the partition.
        """
        return self.build(self.read(args, kwargs)).plan

    def trace(self, config: Config, arguments: Arguments) -> StepTrace:
        """Trace for a configuration, without a session; see ``smp.plan``.

        Args:
            arguments: as ``read`` for this configuration.
        """
        with placement.planning(config):
            return self._trace(arguments)

    # --- arguments

    def _check_decorator(self, tf_function_arguments: Mapping[str, Any]) -> None:
        unknown = sorted(set(tf_function_arguments) - set(_TF_FUNCTION_ARGUMENTS))
        if unknown:
            raise ConfigError(
                f"smp.step does not know {unknown}: step={self.__name__};"
                " known: non_split_inputs, input_split_axes, input_signature,"
                f" {', '.join(_TF_FUNCTION_ARGUMENTS)}"
            )
        if tf_function_arguments.get("jit_compile"):
            raise NotImplementedError(
                "smp.step cannot be compiled as a whole: jit_compile=True"
                f" step={self.__name__}; set `xla` to true in smp.init, which compiles"
                " each segment"
            )
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
                    f"{option} must name parameters of the step:"
                    f" step={self.__name__} unknown={wrong}"
                    f" parameters={sorted(known)}"
                )

    def read(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        config: Config | None = None,
        num_bound: int = 0,
    ) -> Arguments:
        """Find the tensors of a call.

        Args:
            config: the session's if not said.
            num_bound: leading arguments that ``input_signature`` does not count: 1 for
                a method, for its instance.
        """
        if config is None:
            config = session.current(f"step ({self.__name__})").config
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        rules = SplitRules(
            self._configured(config).microbatches,
            self._non_split_inputs,
            self._input_split_axes,
        )
        names = _positional_names(self._signature, len(bound.args))
        signature = self._aligned_signature(len(bound.args), num_bound)
        return read_arguments(bound.args, bound.kwargs, names, rules, signature)

    def _aligned_signature(self, count: int, num_bound: int) -> Sequence[Any] | None:
        if self._input_signature is None:
            return None
        missing = count - len(self._input_signature) - num_bound
        if missing < 0:
            raise TypeError(
                "input_signature has more entries than the call has arguments:"
                f" step={self.__name__} entries={len(self._input_signature)}"
                f" arguments={count - num_bound}"
            )
        return [None] * num_bound + list(self._input_signature) + [None] * missing

    # --- building

    def build(self, arguments: Arguments) -> _Built:
        if whole_values.is_alone():
            raise SmpError(
                "a step needs all ranks, and rank 0 is at work on a file by itself:"
                f" step={self.__name__}; keep functions that call it outside of models"
                " that are saved, and of callbacks that write files"
            )
        current = session.current("step")
        with _building:
            if self._session is not current:  # built for another session: other ranks
                self._session, self._built = current, {}
            if arguments.key not in self._built:
                self._built[arguments.key] = self._build_new(current, arguments)
            return self._built[arguments.key]

    def _trace(self, arguments: Arguments) -> StepTrace:
        return trace_step(
            self._function,
            [argument.microbatch for argument in arguments.tensors],
            lambda function, tensors: _call(function, arguments, tensors),
            autograph=self._autograph,
        )

    def _build_new(self, current: Any, arguments: Arguments) -> _Built:
        trace = self._trace(arguments)
        first_channel = channels.first_free(current)
        require_same_graph(self.__name__, trace.graph, first_channel)
        known = placement.known(trace.models)
        is_first = any(model.placement is None for model in trace.models)
        handles = [id(variable.handle) for variable in trace.variables]
        config = self._configured(current.config)
        profile = profile_of_step(
            self.__name__, trace, arguments, known.profile, config.microbatches
        )
        plan = plan_step(
            trace.graph,
            config,
            {i: known.owner[h] for i, h in enumerate(handles) if h in known.owner},
            known.partition_of_layer,
            given=current.given,
            profile=profile,
            name=self.__name__,
        )
        if is_first and config.horovod:
            require_same_partition(self.__name__, plan)
        if session.rank() == 0:
            if is_first and plan.num_partitions > 1:
                tell_partition(self.__name__, plan, current.json_log)
            for text in plan.advice:
                logger.warning("step=%s: %s", self.__name__, text)
        channels.take(current, num_channels(plan.segments, plan.num_microbatches))
        decided = known.extended(
            {handles[index]: partition for index, partition in plan.owner.items()},
            plan.partition_of_layer,
            profile,
        )
        pp_rank, number = session.pp_rank(), timeline_steps.new_number()
        variables.place(trace.variables, decided.owner, pp_rank)
        placement.place(trace.models, decided)
        emitted = emit_rank(
            trace,
            plan,
            arguments,
            decided.owner,
            pp_rank,
            session.get_pp_group(),
            first_channel,
            number,
            xla_name=self.__name__ if xla.is_wanted(config) else "",
            piece_bytes=AVERAGED_BYTES if config.horovod else PIECE_BYTES,
            device_of=current.gpu_links.device_of,
            make_counter=counters_of(trace.models[0]).of_trace(
                current, text_of(self.__name__, arguments, plan.num_microbatches)
            ),
        )
        current.gpu_links.connect(emitted.program, session.get_pp_group())
        timeline_steps.add(number, self.__name__, plan, emitted.program)
        results = Results(trace.returns, emitted, decided.owner, pp_rank)
        return _Built(plan, emitted.function, results)


def emit_rank(
    trace: StepTrace,
    plan: StepPlan,
    arguments: Arguments,
    owner: Mapping[int, int],
    pp_rank: int,
    peers: Sequence[int],
    first_channel: int,
    number: int = 0,
    xla_name: str = "",
    piece_bytes: int = PIECE_BYTES,
    device_of: Callable[[str, int], str] = lambda dtype, peer: "",
    make_counter: MakeCounter | None = None,
) -> Emitted:
    """Write what ``pp_rank`` does in a step; any process can, for any pp_rank.

    Args:
        owner: id of a variable's handle -> partition.
        peers: pp_rank -> world rank.
        first_channel: channel numbers below are taken by other steps.
        number: what the timeline calls the program.
        xla_name: if said, XLA compiles the segments, and its log calls the step so.
        piece_bytes: of gradients, that a piece of a segment makes.
        device_of: see ``EmitInputs``.
        make_counter: see ``lower_segments``.
    """
    pieces = [
        _pieces(trace, plan, owner, rank, piece_bytes) for rank in range(len(peers))
    ]
    mine = pieces[pp_rank]
    program = lower_program(
        plan.segments,
        plan.schedule,
        pp_rank,
        plan.num_microbatches,
        first_channel,
        number_pieces(itertools.chain(*pieces)),
    )
    sums = sum_positions(trace.returns, owner, pp_rank)
    functions = lower_segments(trace, mine, make_counter)
    if xla_name:
        functions = xla.compile_segments(trace, functions, xla_name)
    return emit(
        EmitInputs(
            graph=trace.graph,
            plan=plan.segments,
            program=program,
            functions=functions,
            arguments=arguments.tensors,
            values=arguments.value_specs,
            sum_groups=group_sums(trace.graph, plan.segments, pp_rank, mine, sums),
            peers=tuple(peers),
            number=number,
            device_of=device_of,
        )
    )


def _pieces(
    trace: StepTrace,
    plan: StepPlan,
    owner: Mapping[int, int],
    pp_rank: int,
    piece_bytes: int,
) -> list[Segment]:
    """The segments of a rank, in pieces; every rank can tell those of every other."""
    sums = sum_positions(trace.returns, owner, pp_rank)
    returned = {trace.graph.returns[position] for position in sums}
    sizes = {tensor: trace.graph.spec(tensor).num_bytes for tensor in returned}
    return [
        piece
        for segment in plan.segments.segments
        if segment.partition == pp_rank
        for piece in split_segment(trace.graph, segment, sizes, piece_bytes)
    ]


class BoundStep:
    """A step that is a method, bound to its instance."""

    def __init__(self, bound: Step, instance: Any) -> None:
        functools.update_wrapper(self, bound)
        self._step, self._instance = bound, instance

    @graphs.unconverted
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step.run(self.read(args, kwargs))

    @graphs.unconverted
    def plan(self, *args: Any, **kwargs: Any) -> StepPlan:
        """See ``Step.plan``."""
        return self._step.build(self.read(args, kwargs)).plan

    def trace(self, config: Config, arguments: Arguments) -> StepTrace:
        """See ``Step.trace``."""
        return self._step.trace(config, arguments)

    def read(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        config: Config | None = None,
    ) -> Arguments:
        """See ``Step.read``."""
        return self._step.read((self._instance, *args), kwargs, config, num_bound=1)


def _call(
    function: Callable[..., Any], arguments: Arguments, tensors: Sequence[tf.Tensor]
) -> Any:
    args, kwargs = arguments.rebuild(tensors)
    return function(*args, **kwargs)


def _positional_names(signature: inspect.Signature, count: int) -> list[str]:
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [parameter.name] * (count - len(names))
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names[:count]
