"""How long does it take until a large model can run its first step?

    python benchmarks/trace_time.py

A BERT-large (24 blocks, hidden 1024, 16 heads, sequence 128), written with ordinary
Keras layers, is traced with its loss and gradients, and planned for 4 partitions:
attributed, partitioned, cut and scheduled. Then every rank's segments are lowered, its
step is emitted, and TensorFlow's graph optimizer (Grappler) runs over what was emitted,
as it does in a first call. All in one process that runs nothing of the step: a plan
does not depend on who makes it. Ranks do the last three phases at the same time, so the
worst rank counts. What a real job adds is one exchange of fingerprints.

The model is new for each M, so that making its variables is part of tracing. Seconds
are wall time, in brackets the processor time of the process. The last line gives the
wall seconds of everything with M = 64, and the ratio of processor times (which a busy
machine disturbs less) without TensorFlow's own optimizer, which takes apart each call
of a segment; the ratio with it stands above.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

import host
import tensorflow as tf
import tf_keras as keras
from tensorflow.python.grappler import tf_optimizer

from smp_tf.config import Config
from smp_tf.frontend.trace import trace_step
from smp_tf.plan.plan_step import plan_step
from smp_tf.runtime import step
from smp_tf.runtime.arguments import SplitRules, read_arguments

PARTITIONS = 4
MICROBATCHES = (4, 64)
EXAMPLES, SEQUENCE, VOCABULARY = 4, 128, 30522  # EXAMPLES in each microbatch


# --- the model ------------------------------------------------------------------------


class Block(keras.layers.Layer):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.project = (
            keras.layers.Dense(hidden, name=name)
            for name in ("query", "key", "value", "project")
        )
        self.widen = keras.layers.Dense(4 * hidden, activation="gelu", name="widen")
        self.narrow = keras.layers.Dense(hidden, name="narrow")
        self.norm_attention = keras.layers.LayerNormalization(name="norm_attention")
        self.norm_output = keras.layers.LayerNormalization(name="norm_output")
        self.dropout = keras.layers.Dropout(0.1, name="dropout")

    def split_heads(self, x: tf.Tensor) -> tf.Tensor:
        batch, length, hidden = x.shape
        x = tf.reshape(x, [batch, length, self.heads, hidden // self.heads])
        return tf.transpose(x, [0, 2, 1, 3])

    def call(self, x: tf.Tensor, training: bool = True) -> tf.Tensor:
        query = self.split_heads(self.query(x))
        key = self.split_heads(self.key(x))
        value = self.split_heads(self.value(x))
        scores = tf.matmul(query, key, transpose_b=True) * query.shape[-1] ** -0.5
        weights = self.dropout(tf.nn.softmax(scores), training=training)
        mixed = tf.transpose(tf.matmul(weights, value), [0, 2, 1, 3])
        mixed = self.project(tf.reshape(mixed, x.shape))
        x = self.norm_attention(x + self.dropout(mixed, training=training))
        out = self.narrow(self.widen(x))
        return self.norm_output(x + self.dropout(out, training=training))


class Bert(smp.DistributedModel):
    """Predicts each token; a tied head multiplies by the embedding of the tokens."""

    def __init__(self, blocks: int, hidden: int, heads: int, is_tied: bool) -> None:
        super().__init__()
        self.tokens = keras.layers.Embedding(VOCABULARY, hidden, name="tokens")
        self.places = keras.layers.Embedding(SEQUENCE, hidden, name="places")
        self.norm = keras.layers.LayerNormalization(name="norm")
        self.blocks = [Block(hidden, heads) for _ in range(blocks)]
        self.head = None if is_tied else keras.layers.Dense(VOCABULARY, name="head")

    def call(self, ids: tf.Tensor) -> tf.Tensor:
        x = self.norm(self.tokens(ids) + self.places(tf.range(SEQUENCE)))
        for block in self.blocks:
            x = block(x)
        if self.head is None:
            return tf.matmul(x, self.tokens.embeddings, transpose_b=True)
        return self.head(x)


def forward_backward(model: Bert) -> Callable[..., Any]:
    def forward_backward(ids: tf.Tensor, labels: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(ids))
            loss = tf.reduce_mean(losses)
        return tape.gradient(loss, model.trainable_variables), loss

    return forward_backward


# --- the clock ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seconds:
    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __str__(self) -> str:
        return f"{self.wall:.2f} ({self.cpu:.2f})"


class Clock:
    """Adds up the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        took = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
        self.seconds[name] = self.seconds.get(name, Seconds()) + took

    @contextlib.contextmanager
    def watching(self, module: Any, phases: dict[str, str]) -> Iterator[None]:
        """Count the calls that ``module`` makes: name of a function -> phase."""
        originals = {name: getattr(module, name) for name in phases}
        for name, phase in phases.items():
            # As a decorator, a phase times each call.
            setattr(module, name, self.phase(phase)(originals[name]))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(module, name, original)

    def total(self) -> Seconds:
        return add_up(self.seconds.values())


def add_up(seconds: Iterable[Seconds]) -> Seconds:
    return sum(seconds, Seconds())


RANK_PHASES = {"lower_program": "lower", "lower_segments": "lower", "emit": "emit"}


# --- the measurement ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """Attributes:
    seconds: phase -> seconds; of the worst rank where ranks differ.
    operations: nodes of the step of one microbatch.
    nodes, optimized: nodes of the worst rank's function, and after optimisation.
    """

    seconds: dict[str, Seconds]
    operations: int
    segments: int
    nodes: int
    optimized: int

    @property
    def ours(self) -> Seconds:
        return add_up(s for phase, s in self.seconds.items() if phase != "optimize")

    @property
    def total(self) -> Seconds:
        return add_up(self.seconds.values())


def measure(options: argparse.Namespace, config: Config) -> Measured:
    clock = Clock()
    count = config.microbatches
    ids = tf.zeros([count * EXAMPLES, SEQUENCE], tf.int32)
    names, rules = ["ids", "labels"], SplitRules(count)
    arguments = read_arguments([ids, ids], {}, names, rules)
    model = Bert(options.blocks, options.hidden, options.heads, options.tied)
    with clock.phase("trace"):
        trace = trace_step(
            forward_backward(model),
            [argument.microbatch for argument in arguments.tensors],
            lambda function, tensors: function(*tensors),
        )
    with clock.phase("fingerprint"):
        trace.graph.fingerprint()
    with clock.phase("plan"):
        plan = plan_step(trace.graph, config, {}, {})
    handles = [id(variable.handle) for variable in trace.variables]
    owner = {handles[index]: partition for index, partition in plan.owner.items()}
    ranks: list[tuple[Clock, int, int]] = []
    for pp_rank in range(config.partitions):
        of_rank = Clock()
        with of_rank.watching(step, RANK_PHASES):
            emitted = step.emit_rank(
                trace,
                plan,
                arguments,
                owner,
                pp_rank,
                peers=range(config.partitions),
                first_channel=0,
            )
        with of_rank.phase("optimize"):
            optimized = optimize(emitted.function)
        ranks.append((of_rank, len(emitted.function.graph.get_operations()), optimized))
    worst, nodes, optimized = max(ranks, key=lambda rank: rank[0].total().wall)
    return Measured(
        {**clock.seconds, **worst.seconds},
        len(trace.graph.nodes),
        len(plan.segments.segments),
        nodes,
        optimized,
    )


def optimize(function: Any) -> int:
    """Grappler over a rank's function and the functions it calls; nodes left."""
    meta_graph = tf.compat.v1.train.export_meta_graph(
        graph=function.graph, graph_def=function.graph.as_graph_def()
    )
    fetches = meta_graph.collection_def["train_op"].node_list.value
    fetches.extend(operation.name for operation in function.graph.control_outputs)
    fetches.extend(tensor.name for tensor in function.graph.outputs)
    config = tf.compat.v1.ConfigProto()
    return len(tf_optimizer.OptimizeGraph(config, meta_graph).node)


def report(results: dict[int, Measured]) -> None:
    few, many = (results[count] for count in MICROBATCHES)

    def row(name: str, cells: Iterable[Any]) -> None:
        print(f"{name:<20}" + "".join(f"{str(cell):>16}" for cell in cells))

    row("seconds: wall (cpu)", (f"M={count}" for count in results))
    for phase in few.seconds:
        row(phase, (each.seconds[phase] for each in results.values()))
    row("all but optimize", (each.ours for each in results.values()))
    row("total", (each.total for each in results.values()))
    for name in ("operations", "segments", "nodes", "optimized"):
        row(name, (getattr(each, name) for each in results.values()))
    print(
        f"ratios: all but optimize cpu={many.ours.cpu / few.ours.cpu:.2f}"
        f" wall={many.ours.wall / few.ours.wall:.2f};"
        f" total cpu={many.total.cpu / few.total.cpu:.2f}"
        f" wall={many.total.wall / few.total.wall:.2f}"
    )
    print(
        f"bert_large_m{MICROBATCHES[1]}_s={many.total.wall:.1f}"
        f" m64_over_m4={many.ours.cpu / few.ours.cpu:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tied", action="store_true", help="head = token embedding")
    options = parser.parse_args()
    print(host.describe())
    smp.init({"partitions": 1})
    # What only the first step of a process pays: the self-test of the hooks, imports.
    small = argparse.Namespace(blocks=1, hidden=16, heads=2, tied=False)
    measure(small, dataclasses.replace(smp.config(), microbatches=2))
    results = {}
    for count in MICROBATCHES:
        config = dataclasses.replace(
            smp.config(),
            partitions=PARTITIONS,
            microbatches=count,
            active_microbatches=PARTITIONS + 2,
        )
        gc.collect()
        results[count] = measure(options, config)
    report(results)


if __name__ == "__main__":
    main()
