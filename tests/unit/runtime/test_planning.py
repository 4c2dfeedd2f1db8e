"""``smp.plan``: a forecast in one process, without a session and without weights."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.frontend.variables import DeferredVariable
from smp_tf.plan.forecast import Forecast
from smp_tf.runtime import placement
from tests.unit.one_process import session

layers = tf.keras.layers


@pytest.fixture(autouse=True)
def no_session() -> None:
    smp.shutdown()


class Stack(smp.DistributedModel):
    def __init__(self, width: int = 64) -> None:
        super().__init__(name="stack")
        self.embed = layers.Embedding(100, width, name="embed")
        self.dense = [layers.Dense(width, name=f"dense_{i}") for i in range(6)]
        self.head = layers.Dense(10, name="head")

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        x = self.embed(x)
        for layer in self.dense:
            x = x + layer(x)
        return self.head(x)


BATCH = tf.zeros([32, 16], tf.int32)


def forecast(model: Any = None, **options: Any) -> Forecast:
    return smp.plan(model or Stack(), BATCH, **{"partitions": 3, **options})


def test_nothing_is_made_and_the_model_stays_as_it_is() -> None:
    """5 GB of weights, on a machine that would notice; then the same model trains."""
    wide = Stack(width=14_000)
    found = forecast(wide, partitions=4)
    assert sum(each.weights for each in found.memory) > 4.5e9
    assert all(isinstance(v, DeferredVariable) for v in wide.variables)
    assert not smp.is_initialized()
    model = Stack()
    two, three = forecast(model, partitions=2), forecast(model, partitions=3)
    assert [len(each.memory) for each in (two, three)] == [2, 3]
    with session(microbatches=2):
        step = smp.step(lambda x: model(x))
        assert step(BATCH).merge().shape == [32, 16, 10]


def test_it_is_the_plan_of_a_session() -> None:
    model = Stack()

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    planned = smp.plan(step, BATCH, partitions=1, microbatches=8)
    with session(microbatches=8):
        real = step.plan(BATCH)
    assert planned.plan.graph.fingerprint() == real.graph.fingerprint()
    assert planned.plan.partition_of_atom == real.partition_of_atom
    assert planned.plan.schedule == real.schedule and planned.plan.owner == real.owner
    assert planned.plan.num_microbatches == 8
    assert smp.partition_table(planned.plan)


def test_figures_add_up() -> None:
    model = Stack()
    found = forecast(model, microbatches=8)
    weights = sum(v.shape.num_elements() * 4 for v in model.variables)
    assert sum(each.weights for each in found.memory) == weights
    assert found.bytes_per_step == 8 * sum(c.spec.num_bytes for c in found.cuts)
    assert {(c.source, c.peer) for c in found.cuts} >= {(0, 1), (1, 2), (2, 1), (1, 0)}
    names = [each.pipeline for each in found.schedules]
    assert names == ["interleaved", "simple", "zero_bubble"]
    configured, other, _ = found.schedules
    assert configured.worst_bytes < other.worst_bytes  # fewer microbatches in flight
    assert 0 < configured.bubble < 1 and configured.seconds > 0
    worst = max(each.total for each in found.memory)
    assert found.fits(worst) and not found.fits(worst - 1)
    assert [s.pipeline for s in forecast(pipeline="simple").schedules] == [
        "simple", "interleaved", "zero_bubble",
    ]  # fmt: skip


def test_auto_is_the_fastest_that_fits() -> None:
    every = forecast(Stack(), microbatches=8, active_microbatches=3)
    fastest = min(every.schedules, key=lambda each: each.seconds)
    found = forecast(Stack(), microbatches=8, active_microbatches=3, pipeline="auto")
    assert found.schedules[0].seconds <= 1.01 * fastest.seconds
    assert found.plan.pipeline == found.schedules[0].pipeline == "zero_bubble"
    assert len({each.pipeline for each in found.schedules}) == len(found.schedules)
    least = min(each.worst_bytes for each in every.schedules)
    tight = forecast(
        Stack(), microbatches=8, pipeline="auto", memory_limit_bytes=least
    )
    assert tight.fits(least)
    with pytest.raises(smp.PartitionError, match="memory_limit_bytes=1000 "):
        forecast(microbatches=8, pipeline="auto", memory_limit_bytes=1000)


def test_every_schedule_has_its_own_default_of_microbatches_in_flight() -> None:
    def by_name(**config: Any) -> dict[str, Any]:
        found = forecast(Stack(), microbatches=16, **config).schedules
        return {each.pipeline: each for each in found}

    # Which one is configured does not change the others.
    assert by_name(pipeline="simple") == by_name(pipeline="zero_bubble") == by_name()
    assert set(by_name(active_microbatches=4)) == {"interleaved", "zero_bubble"}


def test_virtual_stages_need_atoms() -> None:
    found = forecast(partitions=2, virtual_stages=2, microbatches=4)
    visits = [s.partition for s in found.plan.segments.segments]
    assert visits == [0, 1, 0, 1, 1, 0, 1, 0]
    with pytest.raises(smp.PartitionError, match="partitions=2 virtual_stages=40 "):
        forecast(partitions=2, virtual_stages=40)


def test_cut_tensors_are_values() -> None:
    found = forecast(microbatches=8)
    assert len(found.cut_tensors) == len(found.cuts)
    assert (
        sum(each.bytes_per_step for each in found.cut_tensors) == found.bytes_per_step
    )
    first = found.cut_tensors[0]
    assert (first.dtype, first.shape) == ("float32", (4, 16, 64))
    assert (first.source, first.peer) == (0, 1)
    assert first.name == found.cuts[0].tensor
    assert first.bytes_per_step == 8 * 4 * (4 * 16 * 64)


def test_throughput_counts_the_examples_of_the_batch() -> None:
    for batch in (32, 64):
        found = smp.plan(Stack(), tf.zeros([batch, 16], tf.int32), partitions=2)
        for each in found.schedules:
            assert each.examples_per_second == pytest.approx(batch / each.seconds)
    assert "examples/s" in smp.forecast_table(found)
    model = Stack()

    @smp.step(non_split_inputs=["table"], input_split_axes={"x": 1})
    def turned(table: Any, x: Any) -> Any:
        return model(tf.transpose(x)) + tf.reduce_sum(table)

    arguments = (tf.zeros([7]), tf.zeros([16, 24], tf.int32))
    rate = smp.plan(turned, arguments, partitions=2).schedules[0]
    assert rate.examples_per_second == pytest.approx(24 / rate.seconds)

    @smp.step(input_signature=[tf.TensorSpec([None, 16], tf.int32)])
    def unknown(x: Any) -> Any:
        return model(x)

    found = smp.plan(unknown, BATCH, partitions=2)
    assert found.schedules[0].examples_per_second is None
    assert "  ?  " in smp.forecast_table(found)


def test_optimizers_differ_by_their_state() -> None:
    trained = sum(each.optimizer for each in forecast(optimizer=1).memory)
    for optimizer, slots in (
        ("adam", 2),
        (tf.keras.optimizers.legacy.SGD(), 0),
        (tf.keras.optimizers.Adam(amsgrad=True), 3),
        (0.25, 0.25),
    ):
        found = forecast(optimizer=optimizer).memory
        assert sum(each.optimizer for each in found) == slots * trained


def test_people_can_read_it() -> None:
    found = forecast()
    assert repr(found).startswith("partitions=3 microbatches=4 pipeline=interleaved")
    lines = smp.forecast_table(found).splitlines()
    assert lines[0] == "MiB at the fullest moment of each rank"
    assert lines[1].split() == [
        "rank", "weights", "gradients", "optimizer", "activations", "allocator",
        "update", "total",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert "what crosses ranks" in lines and "estimated step by schedule" in lines
    crossing = [line for line in lines if "float32[8, 16, 64]" in line]
    assert len(crossing) == 4 and all(len(line.split()) == 7 for line in crossing)
    assert any(line.startswith("interleaved") for line in lines)


@pytest.mark.parametrize(
    "error, options",
    [
        (smp.PartitionError, {"partitions": 50}),
        (smp.ConfigError, {"partitions": 0}),
        (smp.ConfigError, {"pipelines": "simple"}),
        (smp.MicrobatchError, {"microbatches": 5}),
        (ValueError, {"optimizer": "no such optimizer"}),
    ],
)
def test_errors(error: type[Exception], options: dict[str, Any]) -> None:
    with pytest.raises(error):
        forecast(**options)


def test_only_steps_and_models_are_planned() -> None:
    for other in (lambda x: x, tf.zeros([2, 2]).numpy()):  # an array has a trace, too
        with pytest.raises(TypeError, match="DistributedModel or a function decorated"):
            smp.plan(other, BATCH, partitions=2)


def test_a_step_that_is_a_method_is_planned() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = Stack()

        @smp.step
        def forward(self, x: Any) -> Any:
            return self.model(x)

    found = smp.plan(Trainer().forward, BATCH, partitions=2)
    assert len(found.memory) == 2


def test_a_step_that_is_a_method_keeps_its_signature() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = Stack()

        @smp.step(input_signature=[tf.TensorSpec([None, 16], tf.int32)])
        def forward(self, x: Any) -> Any:
            return self.model(x)

    graph = smp.plan(Trainer().forward, BATCH, partitions=2).plan.graph
    assert str(graph.spec(graph.arguments[0])) == "int32[?, 16]"


# A partition that is saved, and one that is made by hand.


def test_a_saved_partition_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    first = forecast(partitions=3)
    first.save(path)
    again = forecast(partitions=3, partition_file=path)
    assert again.plan.partition_of_atom == first.plan.partition_of_atom
    # Traced from other microbatches, and moved by hand.
    content = json.loads(path.read_text())
    row = next(r for r in content["atoms"] if r["layers"] == ["stack/dense_3"])
    row["partition"] = moved = (row["partition"] + 1) % 3
    path.write_text(json.dumps(content))
    again = forecast(partitions=3, microbatches=8, partition_file=path)
    assert again.plan.graph.fingerprint() != first.plan.graph.fingerprint()
    assert again.plan.partition_of_layer["stack/dense_3"] == moved
    assert [s.pipeline for s in again.schedules] == [
        "interleaved", "simple", "zero_bubble",
    ]  # fmt: skip
    with pytest.raises(smp.ConfigError, match="`partitions` must be 2, as in the conf"):
        forecast(partitions=2, partition_file=path)
    with pytest.raises(smp.ConfigError, match="only one of the file and smp.partition"):
        forecast(partition_file=path, auto_partition=False, default_partition=0)
    with pytest.raises(smp.ConfigError, match="cannot be read"):
        forecast(partition_file=tmp_path / "other.json")


class ByHand(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__(name="by_hand")
        self.dense = [layers.Dense(8, name=f"dense_{i}") for i in range(4)]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for layer, where in zip(self.dense, (2, 0, 1, None)):
            if where is None:
                x = layer(x)
            else:
                with smp.partition(where):
                    x = layer(x)
        return x


def test_a_placement_by_hand_is_planned_without_a_session(tmp_path: Path) -> None:
    manual = {"auto_partition": False, "default_partition": 1}
    found = smp.plan(ByHand(), tf.zeros([8, 8]), partitions=3, **manual)
    where = {f"by_hand/dense_{i}": p for i, p in enumerate((2, 0, 1, 1))}
    assert where.items() <= found.plan.partition_of_layer.items()
    assert set(found.plan.owner.values()) == {0, 1, 2}
    with pytest.raises(smp.PartitionError, match=r"0\.\.1: index=2; partitions=2"):
        smp.plan(ByHand(), tf.zeros([8, 8]), partitions=2, **manual)
    # What is planned counts, also inside a session with another configuration.
    with session():
        again = smp.plan(ByHand(), tf.zeros([8, 8]), partitions=3, **manual)
        assert again.plan.owner == found.plan.owner
        with pytest.raises(smp.PartitionError, match="partitions=1"):
            with smp.partition(2):
                pytest.fail("entered")
    # By hand once, from a file afterwards.
    found.save(tmp_path / "p.json")
    with pytest.warns(UserWarning, match="auto_partition is true"):
        placement._warn_ignored.cache_clear()
        automatic = smp.plan(
            ByHand(), tf.zeros([8, 8]), partitions=3, partition_file=tmp_path / "p.json"
        )
    assert automatic.plan.owner == found.plan.owner


def test_the_name_is_a_function_and_a_package() -> None:
    """``smp.plan`` beside the folder of that name, in any order of imports."""
    assert importlib.import_module("smp_tf.plan.graph").Graph
    from smp_tf.plan import graph

    assert graph.Graph and callable(smp.plan)
