"""The independent solver against enumeration, and the partitioner against the solver.

The second half states the target: the fullest rank within 5 % of the best, and within
10 % of the fewest bytes that can be cut with ranks as full as in our partition.
"""

import itertools
import random

import pytest

from smp_tf.plan.partition import partition_problem
from smp_tf.plan.problem import Flow, Problem
from tests.exact_partition import fewest_bytes, lightest, quick_bound

BALANCE, CUT = 1.05, 1.10


# --- the solver -----------------------------------------------------------------------


def random_problem(seed: int) -> Problem:
    """Up to 9 atoms: a random DAG, flows along it, several readers, flows back."""
    chance = random.Random(seed)
    n, p = chance.randint(4, 9), chance.randint(2, 4)
    pairs = list(itertools.combinations(range(n), 2))
    edges = [pair for pair in pairs if chance.random() < 0.35]
    flows = []
    for _ in range(chance.randint(3, 12)):
        source = chance.randrange(n)
        others = [atom for atom in range(n) if atom != source]
        if chance.random() < 0.7:  # as tensors of the forward go
            others = [v for u, v in edges if u == source] or others
        readers = chance.sample(others, chance.randint(1, min(3, len(others))))
        flows.append(Flow(source, tuple(sorted(readers)), chance.randint(0, 9) * 1000))
    return Problem(
        static_bytes=tuple(chance.randint(0, 50) for _ in range(n)),
        activation_bytes=tuple(chance.randint(0, 20) for _ in range(n)),
        seconds=tuple(chance.randint(0, 30) / 10 for _ in range(n)),
        flows=tuple(flows),
        edges=tuple(edges),
        in_flight=tuple(range(p, 0, -1)) if chance.random() < 0.7 else (4,) * p,
        memory_weight=chance.choice([0.0, 0.2, 0.8, 1.0]),
    )


def enumerate_all(problem: Problem, contiguous: bool) -> list[tuple[int, ...]]:
    ranks = range(problem.num_partitions)
    return [
        chosen
        for chosen in itertools.product(ranks, repeat=problem.num_atoms)
        if len(set(chosen)) == len(ranks)
        and (not contiguous or problem.is_contiguous(chosen))
    ]


def check_solver(problem: Problem, factor: float, contiguous: bool = True) -> None:
    """Both questions, the second one with ``factor`` times the lightest load."""
    every = enumerate_all(problem, contiguous)
    loads = [max(problem.loads(chosen)) for chosen in every]
    if not every:
        assert lightest(problem, contiguous=contiguous).chosen is None
        return
    found = lightest(problem, contiguous=contiguous)
    assert found.is_proven and found.chosen is not None
    assert found.value == pytest.approx(min(loads), rel=1e-4)
    assert max(problem.loads(found.chosen)) == pytest.approx(min(loads), rel=1e-4)
    assert quick_bound(problem, contiguous=contiguous) <= min(loads) * (1 + 1e-4)
    limit = factor * min(loads)
    best = min(
        problem.cut_bytes(chosen)
        for chosen, load in zip(every, loads)
        if load <= limit * (1 + 1e-6)
    )
    fewest = fewest_bytes(problem, limit, contiguous=contiguous)
    assert fewest.is_proven and fewest.chosen is not None
    assert fewest.value == pytest.approx(best, abs=0.5)
    assert problem.cut_bytes(fewest.chosen) == best
    assert fewest.chosen in every


@pytest.mark.parametrize("seed", range(40))
def test_the_solver_equals_enumeration(seed: int) -> None:
    problem = random_problem(seed)
    if problem.num_partitions <= 3 or problem.num_atoms <= 7:
        check_solver(problem, factor=1.0 + seed % 4 * 0.1)


@pytest.mark.parametrize("seed", range(5))
def test_the_solver_equals_enumeration_without_contiguity(seed: int) -> None:
    chance = random.Random(seed)
    while True:
        problem = random_problem(chance.randrange(1000))
        if problem.num_atoms <= 6:
            break
    check_solver(problem, factor=1.2, contiguous=False)


def test_a_bound_on_the_load_that_nothing_keeps() -> None:
    problem = random_problem(0)
    found = fewest_bytes(problem, 0.5 * quick_bound(problem))
    assert found.chosen is None and found.is_proven


# --- the partitioner ------------------------------------------------------------------


class Sketch:
    """A problem written as layers that read other layers.

    Every tensor has a gradient of its size that goes back.
    """

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int, float, int]] = []
        self.inputs: list[list[int]] = []

    def layer(
        self, inputs: list[int], *, weights=100, kept=40, seconds=1.0, out=1000
    ) -> int:
        self.sizes.append((weights, kept, seconds, out))
        self.inputs.append(list(inputs))
        return len(self.sizes) - 1

    def chain(self, start: int, outs: list[int], **sizes: float) -> int:
        for out in outs:
            start = self.layer([start], out=out, **sizes)
        return start

    def problem(self, partitions: int, memory_weight: float = 0.2) -> Problem:
        edges = [(u, v) for v, each in enumerate(self.inputs) for u in each]
        readers: dict[int, list[int]] = {}
        for u, v in edges:
            readers.setdefault(u, []).append(v)
        forward = [Flow(u, tuple(v), self.sizes[u][3]) for u, v in readers.items()]
        backward = [Flow(v, (u,), self.sizes[u][3]) for u, v in edges]
        return Problem(
            static_bytes=tuple(size[0] for size in self.sizes),
            activation_bytes=tuple(size[1] for size in self.sizes),
            seconds=tuple(size[2] for size in self.sizes),
            flows=(*forward, *backward),
            edges=tuple(sorted(edges)),
            in_flight=tuple(range(partitions, 0, -1)),
            memory_weight=memory_weight,
        )


def two_towers() -> Sketch:
    """Of different depth, traced one after the other, that meet at the end."""
    found = Sketch()
    ends = []
    for depth, scale in ((9, 1), (14, 2)):
        start = found.layer([], weights=900 * scale, out=500)
        ends.append(found.chain(start, [1000 * scale] * depth, seconds=1.0 * scale))
    found.layer(ends)
    return found


def inception() -> Sketch:
    """Modules of four branches: each cut inside one crosses all of them."""
    found = Sketch()
    x = found.layer([], out=4000)
    for module in range(4):
        width = 1200 - 200 * module
        branches = [
            found.chain(x, [width]),
            found.chain(x, [width // 2, width], seconds=1.5),
            found.chain(x, [width // 2, width, width], seconds=0.8),
            found.chain(x, [4000, width // 3], weights=10),
        ]
        x = found.layer(branches, weights=0, seconds=0.2, out=4 * width)
    found.layer([x], weights=800)
    return found


def unet() -> Sketch:
    """Long skips from early to late layers."""
    found = Sketch()
    x = found.layer([], kept=400, out=16000)
    skips = []
    for level in range(4):
        out = 16000 // 2**level
        x = found.chain(x, [out, out], kept=400 // 2**level, weights=100 * 4**level)
        skips.append(x)
        x = found.layer([x], weights=0, seconds=0.1, out=out // 4)
    x = found.chain(x, [1000, 1000], weights=20000, kept=20)
    for level in reversed(range(4)):
        out = 16000 // 2**level
        up = found.layer([x], out=out, kept=400 // 2**level)
        x = found.chain(
            found.layer([up, skips[level]], weights=0, seconds=0.3, out=2 * out),
            [out, out],
            kept=400 // 2**level,
            weights=200 * 4**level,
        )
    found.layer([x], out=100)
    return found


def uneven_chain() -> Sketch:
    """Weights, work and widths of neighbours differ by up to a factor of 60."""
    chance = random.Random(3)
    found = Sketch()
    x = found.layer([])
    for _ in range(30):
        x = found.layer(
            [x],
            weights=chance.choice([10, 100, 600]),
            kept=chance.choice([5, 50, 200]),
            seconds=chance.choice([0.1, 1.0, 3.0]),
            out=chance.choice([200, 1000, 4000]),
        )
    return found


def encoder_decoder() -> Sketch:
    """Every layer of the decoder reads the end of the encoder."""
    found = Sketch()
    memory = found.chain(found.layer([], weights=3000), [1000] * 10)
    x = found.layer([], weights=50)
    for _ in range(8):
        key = found.layer([memory], seconds=0.5)
        x = found.layer([found.layer([x]), key], seconds=1.5)
    found.layer([x], weights=3000, seconds=4.0)
    return found


def dense_blocks() -> Sketch:
    """Each layer reads all layers of its block before it."""
    found = Sketch()
    x = found.layer([], out=2000)
    for _ in range(3):
        block = [x]
        for _ in range(7):
            block.append(found.layer(block, out=300, seconds=0.5 + 0.2 * len(block)))
        x = found.layer(block, out=1000, weights=300)
    return found


SKETCHES = (
    two_towers,
    inception,
    unet,
    uneven_chain,
    encoder_decoder,
    dense_blocks,
)


@pytest.mark.parametrize("partitions", [2, 3, 4, 6])
@pytest.mark.parametrize("sketch", SKETCHES, ids=lambda sketch: sketch.__name__)
def test_the_partitioner_is_close_to_the_best(sketch, partitions: int) -> None:
    problem = sketch().problem(partitions)
    ours = partition_problem(problem)
    assert problem.is_contiguous(ours)
    assert set(ours) == set(range(partitions))
    load, cut = max(problem.loads(ours)), problem.cut_bytes(ours)
    best = lightest(problem, at_most=load)
    fewest = fewest_bytes(problem, load)
    assert best.is_proven and fewest.is_proven
    ratios = load / best.value, cut / fewest.value
    assert ratios[0] <= BALANCE and ratios[1] <= CUT, (
        f"{sketch.__name__} on {partitions}: load over best={ratios[0]:.3f},"
        f" cut over best={ratios[1]:.3f}\nours={ours}\nlightest={best.chosen}\n"
        f"fewest={fewest.chosen}"
    )
