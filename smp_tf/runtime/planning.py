"""``smp.plan``: what a partition would be like, in one process and before a launch."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.config import Config, resolve
from smp_tf.errors import ConfigError, PartitionError, SmpError
from smp_tf.frontend.hooks import initial_values, recording
from smp_tf.frontend.optimizers import slots_of
from smp_tf.frontend.trace import StepTrace
from smp_tf.plan import schedules
from smp_tf.plan.forecast import Forecast, forecast
from smp_tf.plan.given import given_by
from smp_tf.plan.plan_step import plan_step
from smp_tf.plan.profile import Profile
from smp_tf.plan.step_plan import StepPlan
from smp_tf.runtime import session
from smp_tf.runtime.profiling import measure, profile_of_models
from smp_tf.runtime.step import BoundStep, Step, step


def plan(
    model_or_step: Any,
    example_inputs: Any,
    *,
    partitions: int,
    microbatches: int = 4,
    optimizer: Any = "adam",
    **config: Any,
) -> Forecast:
    """Trace a model, partition it and forecast its steps; nothing runs, but for a
    profile.

    Needs neither a launcher nor ``smp.init``, and no memory for the weights of a
    ``DistributedModel``. The model stays as it is: it can be planned again, or trained.

        forecast = smp.plan(model, tf.zeros([32, 128], tf.int32), partitions=4)
        print(smp.partition_table(forecast.plan))
        print(smp.forecast_table(forecast))
        forecast.save("partition.json")  # smp.init({"partition_file": ..}) follows it

    Args:
        model_or_step: a function decorated with ``smp.step``, or a DistributedModel,
            which is planned for training with the sum of its outputs as the loss.
        example_inputs: the argument of the call, or a tuple of them; a whole batch,
            that divides into the microbatches.
        optimizer: a Keras optimizer or its name, for the bytes of its state; or a
            number: bytes of state per byte of a trained weight.
        **config: other keys of the configuration (``pipeline``, ``optimize``, ..).
            With ``profile=True`` one microbatch runs here, a few times and atom by
            atom, and seconds are those of this machine; also after ``model.profile``.

    Raises:
        ConfigError, MicrobatchError, PartitionError, TraceError: as ``smp.init`` and a
            step would.
        ValueError: it is not known how much state the optimizer keeps.
    """
    (found,) = plan_all(
        model_or_step,
        example_inputs,
        partitions=[partitions],
        microbatches=[microbatches],
        optimizer=optimizer,
        **config,
    )
    if isinstance(found, SmpError):
        raise found
    return found


def plan_all(
    model_or_step: Any,
    example_inputs: Any,
    *,
    partitions: Sequence[int],
    microbatches: Sequence[int],
    optimizer: Any = "adam",
    over_limit: bool = False,
    **config: Any,
) -> list[Forecast | SmpError]:
    """Forecasts of all combinations; an error in place of one that cannot be. One trace
    for each number of microbatches; else as ``plan``.

    Args:
        over_limit: where ``memory_limit_bytes`` cannot be kept, the plan that needs the
            least memory instead of an error.
    """
    is_number = isinstance(optimizer, int | float)
    slots = float(optimizer) if is_number else slots_of(optimizer)
    is_tuple = isinstance(example_inputs, tuple)
    arguments = example_inputs if is_tuple else (example_inputs,)
    traced = _step_of(model_or_step)
    found: list[Forecast | SmpError] = []
    for count in microbatches:
        trace: StepTrace | None = None
        profile: Profile | None = None
        for ranks in partitions:
            try:
                wanted = {**config, "partitions": ranks, "microbatches": count}
                resolved = resolve(wanted, ranks)
                read = traced.read(arguments, {}, resolved)
                if trace is None:
                    traced_now = traced.trace(resolved, read)
                    profile = profile_of_models(traced_now.models)
                    if resolved.profile and profile is None:
                        profile = measure(traced_now, read, count)
                    trace = traced_now
                planned = functools.partial(
                    plan_step,
                    trace.graph,
                    owner={},
                    partition_of_layer={},
                    optimizer_slots=slots,
                    profile=profile,
                    name=traced.__name__,
                )
                given = given_by(resolved)
                first = _try(
                    functools.partial(planned, given=given), resolved, over_limit
                )
                ours = getattr(first, "pipeline", resolved.pipeline)
                # A saved schedule is one of the configured kind.
                given = dataclasses.replace(given, schedule=None)
                again = functools.partial(planned, given=given)
                each = [
                    _try(again, other, over_limit)
                    for other in _other_schedules(wanted, ranks, ours)
                ]
                found.append(forecast([first, *each], read.num_examples(count)))
            except SmpError as error:
                found.append(error)
    return found


def profile_model(model: Any, inputs: Any) -> Profile:
    """Measure the usual training step of a model; see ``DistributedModel.profile``."""
    if not tf.executing_eagerly():
        raise SmpError(
            "model.profile takes real values: call it outside of every tf.function;"
            f" model={model.name!r}"
        )
    config = (
        session.config()
        if session.is_initialized()
        else resolve({"partitions": 1, "microbatches": 1}, 1)
    )
    traced = step(_training_step(model))
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    arguments = traced.read(given, {}, config)
    with initial_values.kept_layer_seeds(model):
        trace = traced.trace(config, arguments)
    return measure(trace, arguments, config.microbatches)


def _step_of(model_or_step: Any) -> Any:
    """A step, or a bound one; else the usual step of a model."""
    if getattr(model_or_step, recording.DISTRIBUTED_MARK, False):
        return step(_training_step(model_or_step))
    if isinstance(model_or_step, Step | BoundStep):
        return model_or_step
    is_plain = isinstance(model_or_step, tf.keras.Model)
    remedy = "; smp.plan(smp.distribute(model), ..) takes it" if is_plain else ""
    raise TypeError(
        "smp.plan takes a DistributedModel or a function decorated with smp.step:"
        f" model_or_step={model_or_step!r}{remedy}"
    )


def _training_step(model: Any) -> Any:
    def forward_backward(*inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(model(*inputs, training=True))
            sums = [tf.reduce_sum(t) for t in outputs if t.dtype.is_floating]
            loss = tf.add_n([tf.cast(each, tf.float32) for each in sums])
        return tape.gradient(loss, model.trainable_variables), loss

    return forward_backward


def _other_schedules(
    wanted: Mapping[str, Any], ranks: int, ours: str
) -> Iterator[Config]:
    """The configuration with each other schedule, and the defaults of that one."""
    for name in schedules.NAMES:
        if name != ours:
            # The keys may not allow it: simple keeps more than active_microbatches.
            with contextlib.suppress(ConfigError):
                yield resolve({**wanted, "pipeline": name}, ranks)


def _try(
    planned: Callable[..., StepPlan], config: Config, over_limit: bool
) -> StepPlan | PartitionError:
    """Planned with a schedule, which may be one that cannot run the step."""
    try:
        return planned(config=config)
    except PartitionError as error:
        if not over_limit or config.memory_limit_bytes is None:
            return error
    free = dataclasses.replace(config, memory_limit_bytes=None, memory_weight=1.0)
    return _try(planned, free, over_limit)
