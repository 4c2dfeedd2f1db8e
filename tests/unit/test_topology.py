"""Topology: the documented rank tables, and the identities that always hold."""

import itertools

import pytest

from smp_tf.errors import ConfigError
from smp_tf.topology import PLACEMENTS, Topology

PERMUTATIONS = ["DPT", "DTP", "PDT", "PTD", "TDP", "TPD"]

# Every placement of pp=2, tp=2, rdp=3 and some shapes with sizes of one.
SHAPES = [(1, 1, 1), (2, 1, 1), (1, 1, 4), (2, 1, 4), (3, 1, 2), (2, 2, 2), (2, 2, 3)]
CASES = [
    Topology(pp * tp * rdp, pp, tp, placement)
    for pp, tp, rdp in SHAPES
    for placement in PLACEMENTS
]


def groups(topology, kind):
    """Return the distinct groups of a kind, by their first rank."""
    of_rank = getattr(topology, f"{kind}_group")
    return sorted({of_rank(rank) for rank in range(topology.size)})


def test_placements_are_two_names_and_all_permutations():
    assert sorted(PLACEMENTS) == sorted(["cluster", "spread", *PERMUTATIONS])


def test_cluster_as_documented():
    topology = Topology(8, pp_size=2, placement="cluster")
    assert groups(topology, "mp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups(topology, "dp") == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_spread_as_documented():
    topology = Topology(8, pp_size=2, placement="spread")
    assert groups(topology, "mp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert groups(topology, "dp") == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_ptd_as_documented():
    topology = Topology(8, pp_size=2, tp_size=2, placement="PTD")
    place = [
        (topology.rdp_rank(rank), topology.pp_rank(rank), topology.tp_rank(rank))
        for rank in (1, 2, 4)
    ]
    assert place == [(1, 0, 0), (0, 0, 1), (0, 1, 0)]


def test_names_stand_for_permutations():
    for name, letters in {"cluster": "DPT", "spread": "TPD"}.items():
        named, spelled = Topology(12, 3, 2, name), Topology(12, 3, 2, letters)
        for rank in range(12):
            assert named.coordinates(rank) == spelled.coordinates(rank)


# With three sizes of two, a rank's bits are its coordinates, written in the order
# of the letters.
@pytest.mark.parametrize("placement", PERMUTATIONS)
def test_bits_of_eight_ranks(placement):
    topology = Topology(8, pp_size=2, tp_size=2, placement=placement)
    for rank in range(8):
        bits = dict(zip(placement, map(int, f"{rank:03b}")))
        assert topology.coordinates(rank) == (bits["P"], bits["T"], bits["D"])


@pytest.mark.parametrize(
    ("placement", "pp", "tp", "rdp"),
    [
        # Groups of 12 ranks with pp=3, tp=2, rdp=2, written down by hand.
        ("DPT", (0, 2, 4), (0, 1), (0, 6)),
        ("DTP", (0, 1, 2), (0, 3), (0, 6)),
        ("PDT", (0, 4, 8), (0, 1), (0, 2)),
        ("PTD", (0, 4, 8), (0, 2), (0, 1)),
        ("TDP", (0, 1, 2), (0, 6), (0, 3)),
        ("TPD", (0, 2, 4), (0, 6), (0, 1)),
    ],
)
def test_groups_of_twelve_ranks(placement, pp, tp, rdp):
    topology = Topology(12, pp_size=3, tp_size=2, placement=placement)
    assert topology.pp_group(0) == pp
    assert topology.tp_group(0) == tp
    assert topology.rdp_group(0) == rdp


@pytest.mark.parametrize("topology", CASES, ids=str)
def test_sizes(topology):
    assert topology.mp_size * topology.rdp_size == topology.size
    assert topology.pp_size * topology.dp_size == topology.size
    assert topology.pp_size * topology.tp_size * topology.rdp_size == topology.size


@pytest.mark.parametrize("topology", CASES, ids=str)
@pytest.mark.parametrize("kind", ["mp", "dp", "pp", "tp", "rdp"])
def test_groups_divide_the_world(topology, kind):
    found = groups(topology, kind)
    assert sorted(itertools.chain(*found)) == list(range(topology.size))
    for group in found:
        assert len(group) == getattr(topology, f"{kind}_size")
        assert list(group) == sorted(group)
        for place, rank in enumerate(group):
            assert getattr(topology, f"{kind}_rank")(rank) == place
            assert getattr(topology, f"{kind}_group")(rank) == group


@pytest.mark.parametrize("topology", CASES, ids=str)
def test_groups_hold_what_they_should(topology):
    """Compare with a plain search over the coordinates of all ranks."""
    fixed = {"mp": [2], "dp": [0], "pp": [1, 2], "tp": [0, 2], "rdp": [0, 1]}
    for kind, axes in fixed.items():
        for rank in range(topology.size):
            here = topology.coordinates(rank)
            same = tuple(
                other
                for other in range(topology.size)
                if all(topology.coordinates(other)[a] == here[a] for a in axes)
            )
            assert getattr(topology, f"{kind}_group")(rank) == same


@pytest.mark.parametrize("topology", CASES, ids=str)
def test_coordinates_and_rank_at_are_inverses(topology):
    for rank in range(topology.size):
        assert topology.rank_at(*topology.coordinates(rank)) == rank


@pytest.mark.parametrize("topology", CASES, ids=str)
def test_every_replica_numbers_its_ranks_alike(topology):
    """The same pp_rank and tp_rank give the same mp_rank in every replica."""
    numbers = {}
    for rank in range(topology.size):
        place = topology.coordinates(rank)[:2]
        assert numbers.setdefault(place, topology.mp_rank(rank)) == topology.mp_rank(
            rank
        )
        if topology.tp_size == 1:
            assert topology.mp_rank(rank) == topology.pp_rank(rank)


def test_world_group():
    assert Topology(3, 3).world_group() == (0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 4), "size=6, partitions=4, tensor_parallel_degree=1"),
        ((8, 2, 3), "size=8, partitions=2, tensor_parallel_degree=3"),
        ((0, 1), "`size` must be at least 1; size=0"),
        ((4, 2, 1, "DTT"), "placement_strategy='DTT'"),
    ],
)
def test_impossible_topologies(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Topology(*arguments)


def test_ranks_out_of_range():
    topology = Topology(4, 2)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank={rank}, size=4"):
            topology.mp_group(rank)
    with pytest.raises(ValueError, match="pp_rank=2"):
        topology.rank_at(2, 0, 0)
