"""``compile``, ``fit``, ``evaluate`` and ``predict`` of a ``DistributedModel``.

Keras's own loops run on every rank; only what they do with one batch is another thing:

    Keras               next batch, train_step              in one graph
    here    all ranks   next batch, meet the other ranks    in Python
            all ranks   train_step: the pipeline, then the optimizer on this rank's part

So a batch has a known shape before the step is built, and a rank that has another one,
or none, is told before anybody waits for it.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from smp_tf.data_parallel import sharding
from smp_tf.errors import ConfigError
from smp_tf.frontend.hooks import fitting, graphs
from smp_tf.keras import meeting, once, replicas
from smp_tf.keras.attending import attended, class_names
from smp_tf.keras.batches import weighted_sum
from smp_tf.keras.distributed_optimizer import distribute_optimizer
from smp_tf.keras.one_by_one import OneByOne
from smp_tf.keras.own_gradients import require_single_gradients
from smp_tf.keras.steps import BatchSteps
from smp_tf.keras.updates import apply_gradients
from smp_tf.runtime import session

logger = logging.getLogger("smp_tf")

_NEEDS_COMPILE = ("fit", "evaluate", "train_on_batch", "test_on_batch")
_OF_REPLICAS = ("fit", "evaluate", "train_on_batch")
"""What all replicas must call, because they exchange gradients or metrics in it."""

_TOLD = ("epochs", "initial_epoch", "steps_per_epoch", "steps", "validation_steps")
"""Arguments that every rank must give alike; the data is compared batch by batch."""


def _together(name: str) -> Callable[..., Any]:
    """A method of ``tf.keras.Model`` that every rank of the mp_group calls."""
    keras = getattr(tf.keras.Model, name)
    signature = inspect.signature(keras)

    @functools.wraps(keras)
    def method(self: "Training", *args: Any, **kwargs: Any) -> Any:
        session.current(f"DistributedModel.{name}")
        self._require_one_process(name)
        once.refuse_alone(name)
        if name in _NEEDS_COMPILE:
            fitting.require_compiled(self)
        bound = signature.bind(self, *args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        told = {key: bound[key] for key in _TOLD if key in bound}
        if bound.get("callbacks") is not None:
            told["callbacks"] = class_names(bound["callbacks"])
        with meeting.opened(name, name in _OF_REPLICAS, **told), once.quiet():
            if name in ("fit", "train_on_batch"):
                require_single_gradients(self.optimizer)
                if sharding.trains_together():
                    distribute_optimizer(self.optimizer)
                replicas.align(self)
            if "callbacks" in signature.parameters:
                self._attend(name, bound)
            given = {key: value for key, value in bound.items() if key != "self"}
            return getattr(super(Training, self), name)(**given, **extra)

    return method


class Training(tf.keras.Model):
    """The part of ``DistributedModel`` that trains as Keras does.

    ``fit``, ``evaluate``, ``predict`` and their ``_on_batch`` variants take what Keras
    takes, and every rank of an mp_group must call them with the same data in the same
    order. Shuffles agree by themselves where they draw from the global generators of
    NumPy, Python or TensorFlow; the first batches are compared.

    A batch that does not divide into the configuration's microbatches runs as two
    pipelines, see ``batches``; BatchNormalization takes its statistics from each
    microbatch. ``train_step``, ``compute_loss`` and ``compute_metrics`` may be
    overridden; a ``train_step`` of your own runs the model in a function decorated with
    ``smp.step``.

    Raises:
        NotInitializedError: ``smp.init`` was not called.
        RuntimeError: ``compile`` was not called.
        SmpError: on every rank: the ranks have other data, or other arguments.
        ConfigError: ``run_eagerly`` with several processes; a loss, a batch or an
            optimizer that cannot be divided.
    """

    _smp_batch_steps: BatchSteps | OneByOne | None = None

    fit = _together("fit")
    evaluate = _together("evaluate")
    predict = _together("predict")
    train_on_batch = _together("train_on_batch")
    test_on_batch = _together("test_on_batch")
    predict_on_batch = _together("predict_on_batch")

    def compile(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("jit_compile") is True:
            logger.warning(
                "compile(jit_compile=True) has no effect on a DistributedModel, whose"
                " segments are compiled one by one: model=%s; set `xla` to true in"
                " smp.init",
                self.name,
            )
        if kwargs.get("steps_per_execution") == "auto":
            raise ConfigError(
                "each rank would choose by its own clock how many batches it runs at"
                f" once: model={self.name!r} steps_per_execution='auto'; give a number"
            )
        super().compile(*args, **kwargs)
        self._forget_steps()

    compile.__doc__ = tf.keras.Model.compile.__doc__
    # A file of the model names what it was compiled with, as for Keras's own method.
    compile._is_default = True  # type: ignore[attr-defined]

    def _forget_steps(self) -> None:
        # Set past Keras, which would track it as part of the model.
        object.__setattr__(self, "_smp_batch_steps", None)

    @property
    def _steps(self) -> BatchSteps | OneByOne:
        if self._smp_batch_steps is None:
            made = OneByOne(self) if self.run_eagerly else BatchSteps(self)
            object.__setattr__(self, "_smp_batch_steps", made)
        assert self._smp_batch_steps is not None
        return self._smp_batch_steps

    def _require_one_process(self, name: str) -> None:
        if self.run_eagerly and session.mp_size() > 1:
            raise ConfigError(
                "run_eagerly runs the microbatches one by one in one process, without a"
                f" pipeline: model={self.name!r} method={name} run_eagerly=True"
                f" processes={session.mp_size()}; launch the script with one process,"
                " or compile without run_eagerly"
            )

    def _attend(self, call: str, arguments: dict[str, Any]) -> None:
        """The bar on one rank only, and the callbacks as ``attending`` says."""
        if session.rank() != 0:
            arguments["verbose"] = 0
        arguments["callbacks"] = attended(self, call, arguments)

    # --- one batch

    @graphs.unconverted
    def train_step(self, data: Any) -> Any:
        """Forward, backward and update for one batch.

        Returns:
            Name of metric -> value, as in Keras.
        """
        parts = self._steps.run(
            "train_step", tf.keras.utils.unpack_x_y_sample_weight(data)
        )
        shares = [piece.share for piece, _ in parts]
        means = [
            [None if each is None else each.accumulate() for each in gradients]
            for _, (gradients, _) in parts
        ]
        gradients = [weighted_sum(each, shares) for each in zip(*means, strict=True)]
        apply_gradients(
            self.optimizer,
            gradients,
            self.trainable_variables,
            self.global_trainable_variables,
        )
        return self._logs([logs for _, (_, logs) in parts], shares)

    @graphs.unconverted
    def test_step(self, data: Any) -> Any:
        """Loss and metrics of one batch.

        Returns:
            Name of metric -> value, as in Keras.
        """
        parts = self._steps.run(
            "test_step", tf.keras.utils.unpack_x_y_sample_weight(data)
        )
        shares = [piece.share for piece, _ in parts]
        return self._logs([logs for _, (_, logs) in parts], shares)

    @graphs.unconverted
    def predict_step(self, data: Any) -> Any:
        """The model's outputs for one batch, on every rank."""
        x, _, _ = tf.keras.utils.unpack_x_y_sample_weight(data)
        parts = [output for _, output in self._steps.run("predict_step", [x])]
        merged = [_merged(part) for part in parts]
        if len(merged) == 1:
            return merged[0]
        return tf.nest.map_structure(lambda *each: tf.concat(each, 0), *merged)

    def _logs(self, parts: list[Any], shares: list[float]) -> Any:
        """What the metrics say after the batch. Other values that the user's
        ``compute_metrics`` returns are means over the batch."""
        found = self.get_metrics_result()
        for name in parts[0]:
            if name not in found:
                means = [_mean(logs[name]) for logs in parts]
                found[name] = weighted_sum(means, shares)
        return found

    def get_metrics_result(self) -> Any:
        """Name of metric -> value; at the end of an epoch and of ``evaluate`` over the
        batches of all replicas. All ranks get the values of the first one, so that
        callbacks decide alike to the last bit."""
        if not tf.executing_eagerly():
            return super().get_metrics_result()
        with replicas.summed(self.metrics):
            found = super().get_metrics_result()
        values = tf.nest.map_structure(
            lambda value: value.numpy() if tf.is_tensor(value) else value, found
        )
        return meeting.first_of(values)

    # --- the functions that Keras's loops call

    def make_train_function(self, force: bool = False) -> Callable[..., Any]:
        return self._made("train_function", "train", self.train_step, force)

    def make_test_function(self, force: bool = False) -> Callable[..., Any]:
        return self._made("test_function", "test", self.test_step, force)

    def make_predict_function(self, force: bool = False) -> Callable[..., Any]:
        return self._made("predict_function", "predict", self.predict_step, force)

    def _made(
        self, name: str, phase: str, batch_step: Callable[[Any], Any], force: bool
    ) -> Any:
        if getattr(self, name) is None or force:
            setattr(self, name, self._each(phase, batch_step))
        return getattr(self, name)

    def _each(self, phase: str, batch_step: Callable[[Any], Any]) -> Any:
        """A function of an iterator, for as many batches as ``steps_per_execution``."""
        counter = fitting.counter_of(self, phase)
        run = batch_step if self.run_eagerly else tf.function(batch_step)
        if phase == "train" and not self.run_eagerly:
            self.train_tf_function = run  # whose graph TensorBoard shows

        def function(iterator: Iterator[Any]) -> Any:
            results: list[Any] = []
            for _ in range(self._batches_at_once()):
                number = int(counter.numpy())
                try:
                    data = meeting.next_batch(phase, number, iterator)
                except StopIteration:
                    if not results:
                        raise
                    break
                results.append(run(data))
                counter.assign_add(1)
            if phase != "predict" or len(results) == 1:
                return results[-1]
            return tf.nest.map_structure(lambda *each: tf.concat(each, 0), *results)

        return function

    def _batches_at_once(self) -> int:
        count = self.steps_per_execution
        return 1 if count is None else int(count.numpy())


def _mean(value: Any) -> Any:
    return value.reduce_mean() if hasattr(value, "reduce_mean") else value


def _merged(outputs: Any) -> Any:
    return tf.nest.map_structure(lambda output: output.merge(), outputs)
