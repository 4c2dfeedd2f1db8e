"""The processes of `pipeline_speedup.py` that run TensorFlow: see `pipeline_teams.py`.

    pipeline_tf.py plain RANK ADDRESS        the stack without smp_tf, on a core
    pipeline_tf.py ranks CONFIG ADDRESS      under horovodrun: a rank of smp_tf
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline_teams as teams

# Before TensorFlow counts cores.
RANK = int(os.environ.get("HOROVOD_RANK", sys.argv[2] if len(sys.argv) > 2 else 0))
teams.pin(RANK)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smp_tf as smp  # isort: skip  # noqa: E402  (first: it selects Keras 2)

import blocks  # noqa: E402
import tensorflow as tf  # noqa: E402
import tf_keras as keras  # noqa: E402

from smp_tf.plan.memory import memory_by_rank  # noqa: E402

SEED = 1


def stack(base: type) -> Any:
    """The blocks, as a model of this class, with the same weights each time."""
    keras.utils.set_random_seed(SEED)
    return blocks.stack(base, teams.BLOCKS, teams.DIM, teams.HEADS)


class Player:
    """What both kinds of process can be asked for: `prepare`, then `run`."""

    def __init__(self) -> None:
        self._step: Callable[[], tuple[Any, Any]] = lambda: ((), ())
        self._model: Any = None

    def run(self) -> tuple[float, float, float]:
        return teams.timed(lambda: self._step()[0].numpy())

    def results(self) -> tuple[float, dict[str, Any]]:
        """Loss and the gradients of the variables that this process has, by name."""
        loss, gradients = self._step()
        names = [variable.name for variable in self._model.trainable_variables]
        arrays = [gradient.numpy() for gradient in gradients]
        return float(loss), dict(zip(names, arrays, strict=True))

    def _begin(self) -> None:
        self._step, self._model = lambda: ((), ()), None
        keras.backend.clear_session()
        gc.collect()

    def _keep(self, model: Any, step: Any, num_microbatches: int) -> None:
        self._model = model
        inputs, targets = map(tf.constant, teams.batch(num_microbatches))
        self._step = lambda: step(inputs, targets)


class Plain(Player):
    """One microbatch after the other in one function; no pipeline, no smp_tf."""

    def prepare(self, num_microbatches: int) -> None:
        self._begin()
        model = stack(keras.Model)
        model(teams.batch(1)[0])
        variables = model.trainable_variables

        @tf.function
        def microbatch(inputs: tf.Tensor, targets: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(inputs) - targets))
            return loss, tape.gradient(loss, variables)

        @tf.function
        def step(inputs: tf.Tensor, targets: tf.Tensor) -> Any:
            losses, sums, done = [], [], []
            for part in zip(
                tf.split(inputs, num_microbatches), tf.split(targets, num_microbatches)
            ):
                with tf.control_dependencies(done):
                    loss, gradients = microbatch(*part)
                    if sums:
                        gradients = [a + b for a, b in zip(sums, gradients)]
                losses.append(loss)
                sums, done = gradients, [loss, *gradients]
            mean = tf.add_n(losses) / num_microbatches
            return mean, [each / num_microbatches for each in sums]

        self._keep(model, step, num_microbatches)


class Rank(Player):
    """A rank of the pipeline that smp_tf makes of the same stack."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self._config = config

    def prepare(self, num_microbatches: int) -> dict[str, Any]:
        """Build the step; what its plan says."""
        self._begin()
        smp.shutdown()
        smp.init({**self._config, "microbatches": num_microbatches})
        model = stack(smp.DistributedModel)
        names: list[str] = []  # of all variables: outside of the step, only of ours

        @smp.step
        def forward_backward(inputs: tf.Tensor, targets: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(inputs) - targets))
            names[:] = [variable.name for variable in model.trainable_variables]
            return tape.gradient(loss, model.trainable_variables), loss

        @tf.function
        def step(inputs: tf.Tensor, targets: tf.Tensor) -> Any:
            gradients, loss = forward_backward(inputs, targets)
            return loss.reduce_mean(), [each.accumulate() for each in gradients]

        self._keep(model, step, num_microbatches)
        plan = forward_backward.plan(*teams.batch(num_microbatches))
        work = [0.0] * plan.num_partitions
        for cost, partition in zip(plan.costs, plan.partition_of_atom, strict=True):
            work[partition] += cost.seconds
        return {
            "variables": names,
            "work": work,
            "speedup": sum(work) * num_microbatches / plan.report.seconds,
            "activations": max(each.activations for each in memory_by_rank(plan)),
            "table": smp.partition_table(plan),
            "schedule": plan.schedule.to_text(),
            "stages": [
                (s.kind.value, s.rank, s.seconds)
                for s in plan.segments.pipeline().stages
            ],
        }


def main() -> None:
    kind, value, address = sys.argv[1:]
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    player = Plain() if kind == "plain" else Rank(json.loads(value))
    teams.serve(address, RANK, player)
    if smp.is_initialized():
        smp.shutdown()


if __name__ == "__main__":
    main()
