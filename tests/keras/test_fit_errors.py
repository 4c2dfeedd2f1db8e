"""Wrong use of ``fit``: an error on every rank, in seconds, and never a hang."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.keras.scripts import crossentropy, data, dense_net
from tests.ranks import run_ranks, start_ranks

SECONDS = 20.0
X, Y = data(32)


def compiled(**options: Any) -> Any:
    model = dense_net(smp.DistributedModel)
    model.compile("sgd", crossentropy(), **options)
    return model


def batches(rank: int) -> Iterator[Any]:
    for _ in range(3 - rank):
        yield X[:8], Y[:8]


def steps_per_epoch(rank: int) -> None:
    compiled().fit(X, Y, steps_per_epoch=2 + rank, batch_size=8, verbose=0)


def epochs(rank: int) -> None:
    compiled().fit(X, Y, epochs=1 + rank, verbose=0)


def batch_size(rank: int) -> None:
    compiled().fit(X, Y, batch_size=8 + rank, verbose=0)


def values(rank: int) -> None:
    compiled().fit(X + rank, Y, batch_size=8, verbose=0)


def number_of_batches(rank: int) -> None:
    compiled().fit(batches(rank), verbose=0)


def shuffle_without_a_seed(rank: int) -> None:
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(32).batch(8)
    compiled().fit(dataset, verbose=0)


def another_method(rank: int) -> None:
    model = compiled()
    (model.fit if rank else model.evaluate)(X, Y, verbose=0)


def not_compiled(rank: int) -> None:
    dense_net(smp.DistributedModel).fit(X, Y)


def eagerly(rank: int) -> None:
    compiled(run_eagerly=True).fit(X, Y)


def outside_a_step(rank: int) -> None:
    compiled()(X)


def mixed_reductions(rank: int) -> None:
    model = dense_net(smp.DistributedModel)
    model.compile("sgd", [crossentropy(), crossentropy(reduction="sum")])
    model.fit(X, [Y, Y], batch_size=8, verbose=0)


def callbacks(rank: int) -> None:
    attending = [tf.keras.callbacks.EarlyStopping("loss")] if rank == 0 else []
    compiled().fit(X, Y, callbacks=attending, verbose=0)


def learning_rate(rank: int) -> None:
    model = dense_net(smp.DistributedModel)
    model.compile(tf.keras.optimizers.SGD(0.1 + rank, momentum=0.5), crossentropy())
    model.fit(X, Y, verbose=0)


def a_constant_in_the_batch(rank: int) -> None:
    dataset = tf.data.Dataset.from_tensors((X, Y, tf.ones([4, 6])))
    compiled().fit(dataset, verbose=0)


def one_weight_for_all(rank: int) -> None:
    dataset = tf.data.Dataset.from_tensors((X, Y, 0.5))
    compiled().fit(dataset, verbose=0)


def ragged(rank: int) -> None:
    compiled().fit(tf.RaggedTensor.from_tensor(X), Y, batch_size=8, verbose=0)


def no_reduction(rank: int) -> None:
    model = dense_net(smp.DistributedModel)
    model.compile("sgd", crossentropy(reduction="none"))
    model.fit(X, Y, verbose=0)


def batches_by_the_clock(rank: int) -> None:
    compiled(steps_per_execution="auto")


def transformers(rank: int) -> None:
    def halved(pairs: Any) -> Any:
        return [(gradient / 2, variable) for gradient, variable in pairs]

    model = dense_net(smp.DistributedModel)
    legacy = tf.keras.optimizers.legacy.SGD(0.1, gradient_transformers=[halved])
    model.compile(legacy, crossentropy())
    model.fit(X, Y, verbose=0)


RANKS_DIFFER = {
    # The first one: afterwards all ranks have a common seed.
    shuffle_without_a_seed: "tf.keras.utils.set_random_seed",
    steps_per_epoch: "rank 0: fit(steps_per_epoch=2); rank 1: fit(steps_per_epoch=3)",
    epochs: "rank 0: fit(epochs=1); rank 1: fit(epochs=2)",
    batch_size: "rank 1: train batch 0: float32 (9, 6)",
    values: "crc32=",
    number_of_batches: "rank 1: train batch 2: no more data",
    another_method: "rank 0: evaluate(); rank 1: fit()",
    callbacks: "fit(callbacks=['EarlyStopping']); rank 1: fit(callbacks=[])",
    learning_rate: "rank 0: SGD(learning_rate=0.1",
}
ALIKE = {
    not_compiled: "You must compile your model",
    eagerly: "run_eagerly=True processes=2",
    outside_a_step: "a DistributedModel is called inside a function decorated",
    mixed_reductions: "must all be sums over the examples, or all be means",
    a_constant_in_the_batch: "shapes=(32, 6), (32,), (4, 6)",
    one_weight_for_all: "shapes=(32, 6), (32,), ()",
    ragged: "types=['RaggedTensor']",
    no_reduction: "reduction='none'",
    batches_by_the_clock: "steps_per_execution='auto'",
    transformers: "gradient_transformers=['halved']",
}


def try_all() -> dict[str, tuple[str, float]]:
    """Name of case -> (error, seconds), in one launch: a session can go on after an
    error that all ranks had together."""
    found = {}
    for case in (*RANKS_DIFFER, *ALIKE):
        smp.init({"microbatches": 4, "timeout_s": SECONDS})
        start = time.monotonic()
        try:
            case(smp.rank())
            text = "no error"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        found[case.__name__] = re.sub(r"\s+", " ", text), time.monotonic() - start
        smp.shutdown()
    return found


@pytest.mark.timeout(240)
def test_every_rank_is_told() -> None:
    results = run_ranks(2, try_all, timeout=200)
    for found in results:
        for case, expected in {**RANKS_DIFFER, **ALIKE}.items():
            text, seconds = found[case.__name__]
            assert expected in text, (case.__name__, text)
            assert seconds < SECONDS, case.__name__
    for case in RANKS_DIFFER:
        assert results[0][case.__name__][0] == results[1][case.__name__][0]


def leave_one_alone(how: str) -> None:
    smp.init({"microbatches": 4, "timeout_s": 5.0})
    model = compiled()
    if smp.rank() == 1 and how == "does not come":
        time.sleep(12)
    if how == "data fails":

        def data_of_rank() -> Iterator[Any]:
            yield X[:8], Y[:8]
            if smp.rank() == 1:
                raise ValueError("no such file")
            yield X[:8], Y[:8]

        model.fit(data_of_rank(), verbose=0)
    elif smp.rank() == 0 or how == "does not come":
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("how", ["does not come", "data fails"])
def test_a_rank_that_is_missing_is_named(how: str) -> None:
    outcomes = start_ranks(2, leave_one_alone, how, timeout=60)
    assert all(outcome.exit_code for outcome in outcomes)
    assert not any(outcome.timed_out for outcome in outcomes)
    assert "rank 1" in (outcomes[0].error or outcomes[0].output)


def test_fit_needs_a_session() -> None:
    with pytest.raises(smp.NotInitializedError, match="DistributedModel.fit"):
        compiled().fit(X, Y)
