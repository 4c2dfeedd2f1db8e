"""Pieces of a batch: every example once, and means that add up."""

import numpy as np
import pytest
import tensorflow as tf

from smp_tf.keras.batches import Piece, num_rows, pieces_of, weighted_sum


@pytest.mark.parametrize("microbatches", range(1, 9))
@pytest.mark.parametrize("rows", range(1, 40))
def test_pieces_are_the_batch(rows, microbatches):
    pieces = pieces_of(rows, microbatches)
    starts = [piece.start for piece in pieces]
    ends = [piece.start + piece.rows for piece in pieces]
    assert starts == [0, *ends[:-1]] and ends[-1] == rows
    assert sum(piece.share for piece in pieces) == pytest.approx(1.0)
    assert sum(piece.microbatches for piece in pieces) <= microbatches
    largest = -(-rows // microbatches)
    for piece in pieces:
        assert piece.rows % piece.microbatches == 0
        assert piece.rows // piece.microbatches <= largest
    if rows % microbatches == 0:
        assert pieces == (Piece(0, rows, microbatches, 1.0),)


def test_a_piece_of_any_structure():
    x = tf.range(10)
    data = ({"a": x, "b": tf.reshape(x, [10, 1])}, None)
    first, last = pieces_of(10, 4)
    assert (first.microbatches, first.rows, last.rows) == (3, 9, 1)
    assert last.of(data)[0]["a"].numpy().tolist() == [9]
    assert last.of(data)[0]["b"].shape == [1, 1]
    assert last.of(data)[1] is None
    assert num_rows(data) == 10
    assert num_rows(({}, None)) is None
    assert num_rows([tf.TensorSpec([None, 3])]) is None


def test_means_of_pieces_are_the_mean_of_the_batch():
    values = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    pieces = pieces_of(10, 4)
    shares = [piece.share for piece in pieces]
    means = [tf.reduce_mean(piece.of(tf.constant(values)), 0) for piece in pieces]
    np.testing.assert_allclose(weighted_sum(means, shares), values.mean(0), rtol=1e-6)
    assert weighted_sum([None, None], shares) is None
    assert weighted_sum(means[:1], [1.0]) is means[0]  # not a bit is changed


def test_sparse_gradients_stay_sparse():
    def slices(rows):
        indices = tf.range(rows) % 3
        return tf.IndexedSlices(tf.ones([rows, 2]), indices, tf.constant([4, 2]))

    found = weighted_sum([slices(9), slices(1)], [0.9, 0.1])
    assert isinstance(found, tf.IndexedSlices)
    dense = tf.convert_to_tensor(found).numpy()
    np.testing.assert_allclose(dense[:, 0], [2.8, 2.7, 2.7, 0.0], rtol=1e-6)
