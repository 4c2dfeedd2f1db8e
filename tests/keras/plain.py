"""Plain Keras that trains on microbatches: the truth that ``fit`` is held against.

Nothing of smp_tf is used. A batch is cut into microbatches as a user would cut it by
hand: at most M of them, as large as there need be, and a smaller one at the end.
"""

from typing import Any

import tensorflow as tf

unpack = tf.keras.utils.unpack_x_y_sample_weight


class Microbatched(tf.keras.Model):
    """Gradients are means over the examples; layers and metrics see microbatches."""

    microbatches = 1

    def train_step(self, data: Any) -> Any:
        def batch(*flat: tf.Tensor) -> list[tf.Tensor]:
            return self._gradients(tf.nest.pack_sequence_as(data, flat))

        flat = tf.nest.flatten(data)
        gradients = batch(*flat)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return self.get_metrics_result()

    def _gradients(self, data: Any) -> list[Any]:
        x, y, sample_weight = unpack(data)
        total: list[Any] = []
        for part, share in self._parts((x, y, sample_weight)):
            x_part, y_part, weight = part
            with tf.GradientTape() as tape:
                y_pred = self(x_part, training=True)
                loss = self.compute_loss(x_part, y_part, y_pred, weight)
                if hasattr(self.optimizer, "get_scaled_loss"):
                    loss = self.optimizer.get_scaled_loss(loss)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.compute_metrics(x_part, y_part, y_pred, weight)
            dense = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
            scaled = [None if g is None else g * share for g in dense]
            total = [
                b if a is None else a + b for a, b in zip(total or [None] * 99, scaled)
            ]
        if hasattr(self.optimizer, "get_unscaled_gradients"):
            total = self.optimizer.get_unscaled_gradients(total)
        return total

    def test_step(self, data: Any) -> Any:
        for (x, y, sample_weight), _ in self._parts(unpack(data)):
            y_pred = self(x, training=False)
            self.compute_loss(x, y, y_pred, sample_weight)
            self.compute_metrics(x, y, y_pred, sample_weight)
        return self.get_metrics_result()

    def _parts(self, data: Any) -> list[tuple[Any, float]]:
        rows = int(tf.nest.flatten(data)[0].shape[0])
        size = -(-rows // self.microbatches)

        def cut(start: int) -> Any:
            return tf.nest.map_structure(
                lambda t: None if t is None else t[start : start + size], data
            )

        return [
            (cut(start), min(size, rows - start) / rows)
            for start in range(0, rows, size)
        ]

    def make_train_function(self, force: bool = False) -> Any:
        if self.train_function is None or force:
            self.train_function = self._each(self.train_step)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        if self.test_function is None or force:
            self.test_function = self._each(self.test_step)
        return self.test_function

    def _each(self, one: Any) -> Any:
        """Batches of known size, in graphs of their own, as ``_parts`` needs them."""
        graph = tf.function(one)

        def function(iterator: Any) -> Any:
            logs = None
            count = self.steps_per_execution
            for _ in range(1 if count is None else int(count.numpy())):
                try:
                    data = next(iterator)
                except StopIteration:
                    if logs is None:
                        raise
                    break
                logs = graph(data)
            return logs

        return function


def microbatched(model: Any, microbatches: int) -> Any:
    """``model`` itself, which now trains so."""
    kind = type(model)
    model.__class__ = type(f"Microbatched{kind.__name__}", (Microbatched, kind), {})
    model.microbatches = microbatches
    return model
