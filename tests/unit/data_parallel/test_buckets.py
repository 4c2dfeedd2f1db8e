"""Which gradients travel together: a pure function."""

import pytest

from smp_tf.data_parallel.buckets import Part, buckets_of


def part(num_bytes, dtype="float32", owner=None, index_dtype=""):
    return Part((1,), dtype, num_bytes, owner, index_dtype)


def places(parts, window_bytes=10):
    return [bucket.places for bucket in buckets_of(parts, window_bytes)]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        ([None, None], []),
        ([part(1), part(2), part(3)], [(0, 1, 2)]),
        # The last ones are there first; a window holds what fits.
        ([part(4), part(4), part(4), part(4), part(4)], [(3, 4), (1, 2), (0,)]),
        ([part(6), part(4), None, part(1)], [(1, 3), (0,)]),
        ([part(3), part(50), part(3)], [(2,), (1,), (0,)]),  # one may be larger
        ([part(1), part(1, "float16"), part(1)], [(0, 2), (1,)]),
        ([part(1, owner=0), part(1, owner=1), part(1, owner=0)], [(0, 2), (1,)]),
        # Rows, and what has no known size, go alone, and do not cut the window.
        ([part(1), part(None, index_dtype="int64"), part(1)], [(1,), (0, 2)]),
        ([part(1), part(None), part(1)], [(1,), (0, 2)]),
    ],
)
def test_neighbours_of_one_kind(parts, expected):
    assert places(parts) == expected


def test_every_part_travels_once_in_a_bucket_of_its_kind():
    parts = [
        None if i % 7 == 3 else part(i % 5, ("float32", "float16")[i % 2], i % 3)
        for i in range(100)
    ]
    found = buckets_of(parts, 12)
    assert sorted(i for bucket in found for i in bucket.places) == [
        i for i, each in enumerate(parts) if each is not None
    ]
    for bucket in found:
        assert bucket.parts == tuple(parts[i] for i in bucket.places)
        assert len({(each.dtype, each.owner) for each in bucket.parts}) == 1
        assert sum(each.num_bytes or 0 for each in bucket.parts) <= 12


def test_a_part_says_what_it_is():
    assert str(Part((3, 2), "float32", 24)) == "float32 [3, 2] dense"
    rows = Part((None, 2), "float32", None, 1, "int64")
    assert str(rows) == "float32 [None, 2] rows, indices int64"
