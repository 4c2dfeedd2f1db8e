"""What random operations of steps count with, by names that outlive the process.

    model                              the first that the step calls
      train_step(x float32[4]) x 2 #0    a trace: arguments of the step, microbatches,
                                         which one of those that are alike
        0 RandomUniform                    an operation: int64[3], see counted_draws

A rank has the counters of the operations that it runs. A state that is restored before
its step is traced waits for it. A new trace begins anew, as in plain TensorFlow.
"""

import collections
import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.frontend.hooks import initial_values
from smp_tf.runtime.arguments import Arguments
from smp_tf.runtime.counted_draws import MakeCounter

State = Sequence[int]
States = Mapping[str, Mapping[str, State]]
"""trace -> operation -> value of its counter."""


class RandomCounters:
    """Those of the steps of one model, in the current session."""

    def __init__(self) -> None:
        self._session: Any = None
        self._made: dict[str, dict[str, _Counter]] = {}
        self._alike: collections.Counter[str] = collections.Counter()
        self._waiting: dict[str, Mapping[str, State]] = {}

    def of_trace(self, session: Any, text: str) -> MakeCounter:
        """What makes the counters of a new trace.

        Args:
            text: see ``text_of``.
        """
        if self._session is not session:  # its steps are traced again
            self._session = session
            self._made.clear()
            self._alike.clear()
        trace = f"{text} #{self._alike[text]}"
        self._alike[text] += 1
        restored = self._waiting.pop(trace, {})
        made = self._made[trace] = {}

        def make(operation: str, seed: int, seed2: int) -> tf.Variable:
            counter = made[operation] = _Counter(seed, seed2)
            if operation in restored:
                counter.variable.assign(restored[operation])
            return counter.variable

        return make

    def states(self) -> dict[str, dict[str, list[int]]]:
        """For a checkpoint; also of what waits for its step."""
        found = {
            trace: {name: list(state) for name, state in states.items()}
            for trace, states in self._waiting.items()
        }
        for trace, counters in self._made.items():
            if counters:
                found[trace] = {
                    name: counter.variable.numpy().tolist()
                    for name, counter in counters.items()
                }
        return found

    def take_over(self, states: States) -> None:
        """Go on from these. What was not there when they were saved begins anew."""
        for trace, counters in self._made.items():
            restored = states.get(trace, {})
            for name, counter in counters.items():
                counter.variable.assign(restored.get(name, counter.first))
        self._waiting = {
            trace: dict(each)
            for trace, each in states.items()
            if trace not in self._made
        }


class _Counter:
    """One variable, and what it begins with."""

    def __init__(self, seed: int, seed2: int) -> None:
        if not seed and not seed2:  # TensorFlow's sign for none
            seed, seed2 = (secrets.randbits(64) - 2**63 for _ in range(2))
        self.first: State = [0, seed2, seed]
        # Not tf.Variable: no variable creator of the script has a say in it.
        with tf.init_scope(), tf.device("CPU:0"):
            self.variable = initial_values.ResourceVariable(
                self.first, dtype=tf.int64, trainable=False, name="smp_random_counter"
            )


_of_models: weakref.WeakKeyDictionary[Any, RandomCounters] = weakref.WeakKeyDictionary()


def counters_of(model: Any) -> RandomCounters:
    """Those of a model."""
    return _of_models.setdefault(model, RandomCounters())


def text_of(step: str, arguments: Arguments, num_microbatches: int) -> str:
    """A name for the traces of a step, the same in every process."""
    specs = (
        f"{each.name} {each.microbatch.dtype.name}{_shape_text(each.microbatch.shape)}"
        for each in arguments.tensors
    )
    return f"{step}({', '.join(specs)}) x {num_microbatches}"


def _shape_text(shape: tf.TensorShape) -> str:
    if shape.rank is None:
        return "[..]"
    return f"[{','.join(str(size or '?') for size in shape.as_list())}]"
