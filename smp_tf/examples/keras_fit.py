"""Train a MobileNetV2 on real handwritten digits with Keras's own fit.

    horovodrun -np 2 python -m smp_tf.examples.keras_fit
    python -m smp_tf.examples.keras_fit                  (one process, no launcher)

The lines marked with <- are all that differs from plain Keras. The 1797 images of 8 x 8
pixels come with scikit-learn; each pixel becomes 4 x 4.
"""

from __future__ import annotations

import argparse

import smp_tf as smp  # isort: skip  (first: it selects Keras 2)  # <- new

import numpy as np
import tf_keras as keras
from sklearn.datasets import load_digits

NUM_TRAIN = 1440  # the other 357 images are the test set


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 32, 32, 3] between -1 and 1, shuffled, and labels [1797]."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order] / 8.0 - 1.0).astype(np.float32)
    images = images.repeat(4, axis=1).repeat(4, axis=2)[..., np.newaxis]
    return images.repeat(3, axis=3), digits.target[order].astype(np.int32)


def build_model() -> keras.Model:
    """MobileNetV2 from Keras, as small as it comes, for ten classes."""
    model = keras.applications.MobileNetV2(
        input_shape=(32, 32, 3), alpha=0.35, weights=None, classes=10
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # 0.999 is for a longer training than this
    return model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="per epoch; all batches if not said")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    smp.init({"microbatches": options.microbatches})  # <- new
    keras.utils.set_random_seed(1)

    images, labels = load_images()
    model = smp.distribute(build_model())  # <- was build_model()
    steps = options.epochs * (options.steps or NUM_TRAIN // options.batch)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(),
        metrics=["accuracy"],
    )
    model.fit(
        images[:NUM_TRAIN],
        labels[:NUM_TRAIN],
        batch_size=options.batch,
        epochs=options.epochs,
        steps_per_epoch=options.steps,
        verbose=2,
    )
    loss, accuracy = model.evaluate(
        images[NUM_TRAIN:], labels[NUM_TRAIN:], batch_size=options.batch, verbose=0
    )
    if smp.rank() == 0:  # <- new
        print(
            f"test_loss={loss:.4f} test_accuracy={accuracy:.4f} ranks={smp.size()}"
            f" microbatches={options.microbatches}",
            flush=True,
        )


if __name__ == "__main__":
    main()
