"""Which rank does what: placement_strategy -> coordinates and groups.

Every rank has three coordinates, one per letter of the placement strategy:

    P  pp_rank   which partition of the model
    T  tp_rank   which slice of a tensor-parallel layer
    D  rdp_rank  which replica of the (partitioned) model

The right-most letter varies fastest over ascending world ranks, like the digits
of a number. 8 ranks, 2 partitions, no tensor parallelism:

    cluster = DPT        rank   0  1  2  3  4  5  6  7
                         D      0  0  1  1  2  2  3  3
                         P      0  1  0  1  0  1  0  1    mp_groups 01 23 45 67

    spread = TPD         rank   0  1  2  3  4  5  6  7
                         P      0  0  0  0  1  1  1  1
                         D      0  1  2  3  0  1  2  3    mp_groups 04 15 26 37

A group is what remains when some coordinates are held fixed:

    group      fixed       varies   one group holds
    mp_group   D           P, T     one replica of the model
    dp_group   P           T, D     every rank with the same partition
    pp_group   T, D        P        one pipeline
    tp_group   P, D        T        the slices of the same layers
    rdp_group  P, T        D        ranks with identical weights

Members are listed by ascending world rank, and a rank's number in its group is
its place in that list.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from smp_tf.errors import ConfigError

__all__ = ["PLACEMENTS", "Topology"]

_NAMED = {"cluster": "DPT", "spread": "TPD"}

PLACEMENTS: tuple[str, ...] = (
    *_NAMED,
    *("".join(letters) for letters in itertools.permutations("DPT")),
)
"""Every value of ``placement_strategy``: two names and six permutations."""


@dataclass(frozen=True)
class Topology:
    """Ranks and groups of one job, computed from four numbers and a word.

    Attributes:
        size: ranks in the job.
        pp_size: partitions of the model.
        tp_size: ranks that share one tensor-parallel layer.
        placement: one of ``PLACEMENTS``.

    Raises:
        ConfigError: size is not a multiple of pp_size * tp_size, or a value is
            out of range.
    """

    size: int
    pp_size: int
    tp_size: int = 1
    placement: str = "cluster"

    def __post_init__(self) -> None:
        for name in ("size", "pp_size", "tp_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"`{name}` must be at least 1; {name}={getattr(self, name)}"
                )
        if self.placement not in PLACEMENTS:
            raise ConfigError(
                "unknown placement_strategy; "
                f"placement_strategy={self.placement!r}; "
                f"use one of {', '.join(PLACEMENTS)}"
            )
        if self.size % self.mp_size:
            raise ConfigError(
                "the number of ranks must be a multiple of partitions x "
                f"tensor_parallel_degree; size={self.size}, "
                f"partitions={self.pp_size}, tensor_parallel_degree={self.tp_size}"
            )

    # Sizes.

    @property
    def mp_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.pp_size * self.tp_size

    @property
    def rdp_size(self) -> int:
        """Replicas of the model."""
        return self.size // self.mp_size

    @property
    def dp_size(self) -> int:
        """Ranks that hold the same partition."""
        return self.tp_size * self.rdp_size

    # Coordinates.

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Return (pp_rank, tp_rank, rdp_rank) of a world rank."""
        self._require_rank(rank)
        place, rest = {}, rank
        for letter in reversed(self._letters):
            rest, place[letter] = divmod(rest, self._extent(letter))
        return place["P"], place["T"], place["D"]

    def rank_at(self, pp_rank: int, tp_rank: int, rdp_rank: int) -> int:
        """Return the world rank at these coordinates: coordinates() reversed."""
        place = {"P": pp_rank, "T": tp_rank, "D": rdp_rank}
        rank = 0
        for letter in self._letters:
            if not 0 <= place[letter] < self._extent(letter):
                raise ValueError(
                    f"no rank has these coordinates; pp_rank={pp_rank}, "
                    f"tp_rank={tp_rank}, rdp_rank={rdp_rank}, pp_size="
                    f"{self.pp_size}, tp_size={self.tp_size}, "
                    f"rdp_size={self.rdp_size}"
                )
            rank = rank * self._extent(letter) + place[letter]
        return rank

    def pp_rank(self, rank: int) -> int:
        """Return the partition that a world rank holds."""
        return self.coordinates(rank)[0]

    def tp_rank(self, rank: int) -> int:
        """Return a world rank's place in its tp_group."""
        return self.coordinates(rank)[1]

    def rdp_rank(self, rank: int) -> int:
        """Return a world rank's place in its rdp_group."""
        return self.coordinates(rank)[2]

    def mp_rank(self, rank: int) -> int:
        """Return a world rank's place in its mp_group."""
        return self.mp_group(rank).index(rank)

    def dp_rank(self, rank: int) -> int:
        """Return a world rank's place in its dp_group."""
        return self.dp_group(rank).index(rank)

    # Groups: world ranks, ascending.

    def world_group(self) -> tuple[int, ...]:
        """Return every rank of the job."""
        return tuple(range(self.size))

    def mp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that share one replica of the model with `rank`."""
        return self._group(rank, varies="PT")

    def dp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the same partition as `rank`."""
        return self._group(rank, varies="TD")

    def pp_group(self, rank: int) -> tuple[int, ...]:
        """Return the pipeline that `rank` is part of, in order of partitions."""
        return self._group(rank, varies="P")

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold slices of the same layers as `rank`."""
        return self._group(rank, varies="T")

    def rdp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the very same weights as `rank`."""
        return self._group(rank, varies="D")

    @property
    def _letters(self) -> str:
        return _NAMED.get(self.placement, self.placement)

    def _extent(self, letter: str) -> int:
        return {"P": self.pp_size, "T": self.tp_size, "D": self.rdp_size}[letter]

    def _group(self, rank: int, varies: str) -> tuple[int, ...]:
        here = dict(zip("PTD", self.coordinates(rank)))
        choices = (
            range(self._extent(letter)) if letter in varies else (here[letter],)
            for letter in "PTD"
        )
        return tuple(
            sorted(self.rank_at(*place) for place in itertools.product(*choices))
        )

    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"no such rank; rank={rank}, size={self.size}")
