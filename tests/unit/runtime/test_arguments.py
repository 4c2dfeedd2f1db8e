"""Reading the arguments of one call: what is split, what is kept, what is the key."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from smp_tf.errors import MicrobatchError
from smp_tf.runtime.arguments import Arguments, Feed, SplitRules, read_arguments

Point = collections.namedtuple("Point", "x y")


def read(
    *args: Any,
    microbatches: int = 2,
    whole: Sequence[str] = (),
    axes: Mapping[str, int] | None = None,
    signature: Sequence[Any] | None = None,
    **kwargs: Any,
) -> Arguments:
    rules = SplitRules(microbatches, frozenset(whole), dict(axes or {}))
    names = "abcdef"[: len(args)]
    return read_arguments(args, kwargs, names, rules, signature)


def shapes(arguments: Arguments) -> list[list[int | None]]:
    return [tensor.microbatch.shape.as_list() for tensor in arguments.tensors]


def test_tensors_are_found_at_any_depth_in_order() -> None:
    arguments = read(
        tf.zeros([4, 1]),
        [tf.zeros([4, 2]), (tf.zeros([4, 3]), {"k": np.zeros([4, 4])})],
        Point(tf.zeros([4, 5]), 7),
        other={"deep": [tf.zeros([4, 6])]},
    )
    assert shapes(arguments) == [[2, n] for n in range(1, 7)]
    assert [tensor.name for tensor in arguments.tensors] == [
        "a",
        "b[0]",
        "b[1][0]",
        "b[1][1]['k']",
        "c[0]",
        "other['deep'][0]",
    ]
    args, kwargs = arguments.rebuild(list(range(6)))
    assert args == (0, [1, (2, {"k": 3})], Point(4, 7))
    assert type(args[2]) is Point
    assert kwargs == {"other": {"deep": [5]}}


def test_structures_are_rebuilt_with_their_types_and_order() -> None:
    class MyDict(dict):
        pass

    given = {
        "ordered": collections.OrderedDict(b=tf.zeros([2]), a=tf.zeros([2])),
        "mine": MyDict(z=tf.zeros([2]), y=1),
        "default": collections.defaultdict(list, k=tf.zeros([2])),
        "set": {1, 2},
        "frozen": frozenset([3]),
        "none": None,
    }
    ((rebuilt,), _) = read(given).rebuild("ABCD")
    assert rebuilt == {
        "ordered": collections.OrderedDict(b="A", a="B"),
        "mine": {"z": "C", "y": 1},
        "default": {"k": "D"},
        "set": {1, 2},
        "frozen": frozenset([3]),
        "none": None,
    }
    for name in given:
        assert type(rebuilt[name]) is type(given[name]), name
    assert list(rebuilt["ordered"]) == ["b", "a"]


def test_other_mappings_are_not_mistaken_for_constants() -> None:
    """A UserDict (Hugging Face's BatchEncoding is one) holds tensors like a dict."""
    batch = collections.UserDict(ids=tf.zeros([4, 3], tf.int32))
    arguments = read(batch)
    assert shapes(arguments) == [[2, 3]]
    ((rebuilt,), _) = arguments.rebuild("T")
    assert type(rebuilt) is collections.UserDict and rebuilt["ids"] == "T"


def test_numpy_arrays_and_scalars_are_tensors() -> None:
    arguments = read(np.zeros([4, 2], np.float64), np.float32(3), whole=["b"])
    assert [v.dtype for v in arguments.values] == [tf.float64, tf.float32]
    assert [t.feed for t in arguments.tensors] == [Feed.SPLIT, Feed.WHOLE]
    assert shapes(arguments) == [[2, 2], []]


def test_axes() -> None:
    arguments = read(tf.zeros([3, 8]), [tf.zeros([3, 5, 4])], axes={"a": 1, "b": -1})
    assert shapes(arguments) == [[3, 4], [3, 5, 2]]
    assert [tensor.axis for tensor in arguments.tensors] == [1, -1]


def test_variables_are_constants() -> None:
    variable = tf.Variable(tf.zeros([4]))
    arguments = read(variable)
    assert not arguments.tensors
    assert arguments.rebuild([])[0][0] is variable


def test_key_is_equal_for_calls_that_can_share_a_trace() -> None:
    def key(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs).key
        hash(found)
        return found

    x = tf.zeros([4, 2])
    assert key(x, 1, flag=True) == key(tf.ones([4, 2]), 1, flag=True)
    assert key({"k": x, "s": "t"}) == key({"k": tf.ones([4, 2]), "s": "t"})
    others = [
        key(x, 2, flag=True),
        key(x, 1, flag=False),
        key(x, True, flag=True),
        key(x, 1.0, flag=True),
        key(x, 1),
        key(tf.zeros([6, 2]), 1, flag=True),
        key(tf.zeros([4, 2], tf.float64), 1, flag=True),
        key([x], 1, flag=True),
        key(x, 1, flag=True, whole=["a"]),
        key(x, 1, flag=True, axes={"a": 1}),
        key(x, 1, other=True),
    ]
    assert len({key(x, 1, flag=True), *others}) == len(others) + 1
    assert key([1, [2]], 3) != key([1, [2], 3])
    assert key({"a": 1}, {}) != key({}, {"a": 1})


def test_key_of_an_object_without_a_hash_is_its_identity() -> None:
    class Settings:
        def __eq__(self, other: object) -> bool:
            return True

    one, other = Settings(), Settings()
    assert read(one).key == read(one).key
    assert read(one).key != read(other).key


def test_key_keeps_the_object_alive() -> None:
    """Another object in the same place of memory must not be taken for this one."""

    class Settings:
        __hash__ = None  # type: ignore[assignment]

    keys = [read(Settings()).key for _ in range(20)]
    assert len(set(keys)) == 20


@pytest.mark.parametrize(
    "shape, axes, parts",
    [
        ([5, 2], {}, [r"'a'", r"\(5, 2\)", "microbatches=2", "non_split_inputs"]),
        ([0, 2], {}, ["non-zero", r"\(0, 2\)"]),
        ([], {}, [r"shape=\(\)", "axis=0", "non_split_inputs"]),
        ([4, 3], {"a": 1}, [r"\(4, 3\)", "axis=1", "microbatches=2"]),
        ([4, 3], {"a": 2}, [r"\(4, 3\)", "axis=2"]),
        ([4, 3], {"a": -3}, ["axis=-3"]),
    ],
)
def test_batches_that_do_not_divide(
    shape: list[int], axes: Mapping[str, int], parts: list[str]
) -> None:
    with pytest.raises(MicrobatchError) as caught:
        read(tf.zeros(shape), axes=axes)
    for part in parts:
        assert caught.match(part)
    read(tf.zeros(shape), whole=["a"])  # the remedy works


def test_error_names_the_place_inside_the_argument() -> None:
    with pytest.raises(MicrobatchError, match=r"argument=\"b\['k'\]\[1\]\""):
        read(tf.zeros([4]), {"k": [tf.zeros([4]), tf.zeros([3])]})


@pytest.mark.parametrize(
    "value",
    [tf.sparse.eye(4), tf.ragged.constant([[1], [2, 3]]), tf.IndexedSlices([1.0], [0])],
    ids=["sparse", "ragged", "slices"],
)
def test_composite_tensors_are_refused(value: Any) -> None:
    with pytest.raises(MicrobatchError, match=r"'a'.*type=\w+.*smp_slice"):
        read(value)


def test_signature_gives_the_shape_of_the_trace() -> None:
    spec = tf.TensorSpec([None, 3], tf.float32)
    four, six = (read(tf.zeros([n, 3]), signature=[spec]) for n in (4, 6))
    assert shapes(four) == [[None, 3]] and four.key == six.key
    assert four.value_specs[0].shape.as_list() == [None, 3]
    fixed = read(tf.zeros([4, 3]), signature=[tf.TensorSpec([4, None], tf.float32)])
    assert shapes(fixed) == [[2, None]]
    unknown = read(tf.zeros([4, 3]), signature=[tf.TensorSpec(None, tf.float32)])
    assert unknown.tensors[0].microbatch.shape.rank is None
    nested = read({"k": [tf.zeros([4, 3])]}, signature=[{"k": [spec]}])
    assert shapes(nested) == [[None, 3]]


def test_signature_turns_python_numbers_into_tensors() -> None:
    spec = tf.TensorSpec([], tf.float32)
    one, two = (read(v, whole=["a"], signature=[spec]) for v in (1, 2.5))
    assert one.key == two.key and two.values[0].dtype == tf.float32


@pytest.mark.parametrize(
    "value", [tf.zeros([4, 4]), tf.zeros([4]), tf.zeros([4, 3], tf.int32), [[1], [2]]]
)
def test_arguments_that_do_not_match_the_signature(value: Any) -> None:
    with pytest.raises(TypeError, match=r"argument='a'.*signature"):
        read(value, signature=[tf.TensorSpec([None, 3], tf.float32)])


@pytest.mark.parametrize(
    "value, signature", [({"a": 1, "b": 2}, {"a": None}), ([1, 2], [None]), ([1], {})]
)
def test_structures_that_do_not_match_the_signature(value: Any, signature: Any) -> None:
    with pytest.raises(TypeError, match=r"argument='a' has an element"):
        read(value, signature=[signature])


def test_signature_does_not_hide_an_indivisible_batch() -> None:
    with pytest.raises(MicrobatchError, match=r"'a'.*\(3, 3\)"):
        read(tf.zeros([3, 3]), signature=[tf.TensorSpec([None, 3], tf.float32)])


class Batch:
    """Splits itself into objects of its own kind."""

    def __init__(self, x: Any, name: str = "batch") -> None:
        self.x, self.name = x, name

    def smp_slice(self, num_mb: int, mb: int, axis: int) -> "Batch":
        return Batch(tf.split(self.x, num_mb, axis)[mb], self.name)


class Rows:
    """Splits itself into whatever ``form`` makes of its rows; sizes may differ."""

    def __init__(self, form: Any, rows: Sequence[Any]) -> None:
        self.form, self.rows = form, rows

    def smp_slice(self, num_mb: int, mb: int, axis: int) -> Any:
        return self.form(self.rows[mb])


def test_objects_with_smp_slice_split_themselves() -> None:
    batch = Batch(tf.reshape(tf.range(24.0), [4, 6]))
    arguments = read(batch, batch, axes={"b": 1})
    values = [value.shape.as_list() for value in arguments.values]
    assert values == [[2, 6], [2, 6], [4, 3], [4, 3]]


def test_slices_are_fed_one_by_one() -> None:
    batch = Batch(tf.reshape(tf.range(12.0), [4, 3]))
    arguments = read(tf.zeros([2]), batch)
    assert [t.feed for t in arguments.tensors] == [Feed.SPLIT, Feed.SLICED]
    assert shapes(arguments) == [[1], [2, 3]]
    np.testing.assert_array_equal(arguments.values[1], batch.x[:2])
    np.testing.assert_array_equal(arguments.values[2], batch.x[2:])
    ((_, rebuilt), _) = arguments.rebuild(["unused", "slice"])
    assert type(rebuilt) is Batch
    assert (rebuilt.x, rebuilt.name) == ("slice", "batch")
    assert isinstance(batch.x, tf.Tensor), "the user's object was changed"


@pytest.mark.parametrize(
    "form, expected",
    [
        (lambda row: row, "S"),
        (lambda row: {"row": row, "k": 1}, {"row": "S", "k": 1}),
        (lambda row: (row, None), ("S", None)),
        (lambda row: [row], ["S"]),
    ],
    ids=["tensor", "dict", "tuple", "list"],
)
def test_slices_may_be_tensors_or_structures(form: Any, expected: Any) -> None:
    rows = Rows(form, [tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])])
    arguments = read(rows)
    assert [v.numpy().tolist() for v in arguments.values] == [[1, 2], [3, 4]]
    assert arguments.rebuild(["S"])[0] == (expected,)


def test_slices_of_different_form_are_refused() -> None:
    rows = Rows(lambda row: row, [tf.zeros([2]), tf.zeros([3])])
    with pytest.raises(MicrobatchError, match=r"'a'.*type=Rows"):
        read(rows)


def test_whole_objects_are_not_sliced() -> None:
    arguments = read(Batch(tf.zeros([3, 3])), whole=["a"])
    assert [v.shape.as_list() for v in arguments.values] == [[3, 3]] * 2
