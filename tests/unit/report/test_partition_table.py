"""The partition table, held against numbers added up by hand from the model."""

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.unit.one_process import session


class Stack(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__(name="stack")
        self.first = tf.keras.layers.Dense(8, name="first")
        self.second = tf.keras.layers.Dense(16, name="second")
        self.third = tf.keras.layers.Dense(4, name="third")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.third(self.second(self.first(x)))


def cells(line: str) -> list[str]:
    """The columns, which two or more blanks separate."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_one_partition_holds_everything() -> None:
    with session():
        model = Stack()
        plan = smp.step(lambda x: model(x)).plan(tf.zeros([2, 3]))
        lines = smp.partition_table(plan).splitlines()
        weights = sum(int(np.prod(v.shape)) * 4 for v in model.variables)
    assert weights == 4 * ((3 + 1) * 8 + (8 + 1) * 16 + (16 + 1) * 4)
    assert cells(lines[0]) == [
        "partition",
        "layers",
        "variables",
        "weight bytes",
        "peak bytes",
        "compute share",
        "cut bytes",
    ]
    assert set(lines[1]) == {"-", " "} and lines[1] == lines[3]
    assert cells(lines[2]) == [
        "0",
        "first .. third (3)",
        "6",
        f"{weights:,}",
        # Adam's slots; a product and its sum with the bias, 2 rows of 16 floats each;
        # the batch; the allocator's share. Without gradients there is no update.
        f"{3 * weights + round(1.12 * (2 * 4 * 2 * 16 + 4 * 2 * 3)):,}",
        "100.0 %",
        "0",
    ]
    assert cells(lines[4])[:4] == ["all", "3 layers", "6", f"{weights:,}"]
    assert len(lines) == 5
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("partitions", [2, 3])
def test_partitions_add_up(partitions: int) -> None:
    """Planned for several partitions, without running them."""
    import dataclasses

    from smp_tf.plan.plan_step import plan_step

    with session(microbatches=2):
        model = Stack()

        @smp.step
        def step(x: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(model(x) ** 2)
            return tape.gradient(loss, model.trainable_variables), loss

        graph = step.plan(tf.zeros([4, 3])).graph
        config = dataclasses.replace(smp.config(), partitions=partitions)
    plan = plan_step(graph, config, {}, {})
    lines = [cells(line) for line in smp.partition_table(plan).splitlines()]
    rows, total = lines[2:-2], lines[-1]
    assert [row[0] for row in rows] == [str(i) for i in range(partitions)]
    for column in (2, 3, 4, 6):
        numbers = [int(row[column].replace(",", "")) for row in [*rows, total]]
        assert sum(numbers[:-1]) == numbers[-1] > 0, lines[0][column]
    shares = [float(row[5].split()[0]) for row in rows]
    assert abs(sum(shares) - 100.0) < 0.1 * partitions
    assert total[1] == "3 layers"
    # Forward: 2 rows of 8, or 8 and 16, floats cross; backward the same; the loss, 4
    # bytes, goes to the other ranks.
    if partitions == 3:
        assert int(total[6]) == 2 * (2 * 8 * 4 + 2 * 16 * 4) + 2 * 4
