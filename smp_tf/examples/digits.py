"""Classify real handwritten digits with a convolutional network split over processes.

    horovodrun -np 2 python -m smp_tf.examples.digits
    horovodrun -np 4 python -m smp_tf.examples.digits --partitions 2    (two replicas)
    python -m smp_tf.examples.digits                     (one process, no launcher)

The 1797 images of 8 x 8 pixels come with scikit-learn. The library splits the network
over the ranks of a replica, which all feed the same batches, and each batch into
microbatches. Each replica trains on its share of a batch; gradients are averaged.
"""

from __future__ import annotations

import argparse
import time
from typing import Callable, Iterator

import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

import numpy as np
import tensorflow as tf
import tf_keras as keras
from sklearn.datasets import load_digits

from smp_tf.examples.progress import Progress

NUM_TRAIN = 1440  # the other 357 images are the test set


class DigitNet(smp.DistributedModel):
    """Three convolutions and two dense layers; logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers = keras.layers
        self.conv1 = layers.Conv2D(32, 3, padding="same", activation="relu")
        self.conv2 = layers.Conv2D(64, 3, padding="same", activation="relu")
        self.pool = layers.MaxPooling2D()
        self.conv3 = layers.Conv2D(64, 3, padding="same", activation="relu")
        self.flatten = layers.Flatten()
        self.dense1 = layers.Dense(128, activation="relu")
        self.dropout = layers.Dropout(0.3, seed=1)
        self.dense2 = layers.Dense(10)

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        hidden = self.pool(self.conv2(self.conv1(images)))
        hidden = self.dense1(self.flatten(self.conv3(hidden)))
        return self.dense2(self.dropout(hidden, training=training))


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """All images [1797, 8, 8, 1] in 0..1 and their labels, in a fixed random order."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, ..., np.newaxis] / 16.0).astype(np.float32)
    return images, digits.target[order].astype(np.int32)


def batches(
    images: np.ndarray, labels: np.ndarray, size: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This replica's share of one epoch of whole batches.

    The order depends on the epoch only.
    """
    order = np.random.default_rng(epoch).permutation(len(labels))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size][smp.dp_rank() :: smp.dp_size()]
        yield images[chosen], labels[chosen]


def accuracy(
    predict: Callable[[tf.Tensor], tf.Tensor],
    images: np.ndarray,
    labels: np.ndarray,
    size: int,
) -> float:
    """Share of images whose largest logit is that of the right digit."""
    correct = 0
    for start in range(0, len(labels), size):
        some = images[start : start + size]
        missing = size - len(some)  # padded: whole batches only, so no second trace
        padded = np.pad(some, [(0, missing)] + [(0, 0)] * 3)
        digits = np.argmax(predict(tf.constant(padded)), axis=1)[: len(some)]
        correct += int(np.sum(digits == labels[start : start + size]))
    return correct / len(labels)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument(
        "--pipeline", default="interleaved", help="simple, zero_bubble or auto"
    )
    parser.add_argument(
        "--partitions", type=int, help="ranks of one replica (default: all ranks)"
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--batch", type=int, default=48, help="images per step, of all replicas"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    config = {"microbatches": options.microbatches, "pipeline": options.pipeline}
    if options.partitions is not None:
        config.update(partitions=options.partitions, horovod=True)
    smp.init(config)
    keras.utils.set_random_seed(1)

    images, labels = load_images()
    test_images, test_labels = images[NUM_TRAIN:], labels[NUM_TRAIN:]
    images, labels = images[:NUM_TRAIN], labels[:NUM_TRAIN]

    model = DigitNet()
    optimizer = keras.optimizers.Adam(2e-3)
    if smp.dp_size() > 1:
        optimizer = smp.DistributedOptimizer(optimizer)
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @smp.step
    def forward_backward(images, labels):
        with tf.GradientTape() as tape:
            loss = loss_function(labels, model(images, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(images, labels):
        gradients, loss = forward_backward(images, labels)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss.reduce_mean()

    @smp.step
    def forward(images):
        return model(images, training=False)

    @tf.function
    def predict(images):
        return forward(images).merge()

    started = time.monotonic()
    plan = forward_backward.plan(*next(batches(images, labels, options.batch, 0)))
    if smp.rank() == 0:
        print(smp.partition_table(plan), flush=True)

    for epoch in range(options.epochs):
        steps = len(labels) // options.batch
        label = f"epoch {epoch + 1}/{options.epochs}"
        progress = Progress(label, steps, visible=smp.rank() == 0)
        total = 0.0
        epoch_batches = batches(images, labels, options.batch, epoch)
        for step, batch in enumerate(epoch_batches, start=1):
            total += float(train_step(*map(tf.constant, batch)))
            progress.update(step, f"loss {total / step:.4f}")
    seconds = time.monotonic() - started

    share = accuracy(predict, test_images, test_labels, options.batch)
    if smp.rank() == 0:
        print(
            f"test_accuracy={share:.4f} ranks={smp.size()} replicas={smp.dp_size()} "
            f"microbatches={options.microbatches} schedule={options.pipeline} "
            f"seconds={seconds:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
