"""Problems for the partitioner, and what an exhaustive search says about them."""

import itertools
import random

from smp_tf.plan.problem import Flow, Problem


def problem(
    static,
    partitions,
    *,
    activations=None,
    seconds=None,
    flows=(),
    edges=None,
    in_flight=None,
    memory_weight=1.0,
    memory_limit=None,
):
    """A chain by default, whose atoms have these static bytes."""
    n = len(static)
    if edges is None:
        edges = tuple(itertools.pairwise(range(n)))
    return Problem(
        tuple(static),
        tuple(activations or [0] * n),
        tuple(seconds or [0.0] * n),
        tuple(Flow(*flow) for flow in flows),
        tuple(edges),
        tuple(in_flight or [1] * partitions),
        memory_weight,
        memory_limit,
    )


def chain_flows(*sizes):
    """Bytes between neighbours of a chain, forward."""
    return [(i, (i + 1,), size) for i, size in enumerate(sizes)]


def random_problem(seed, *, is_chain=False, atoms=8):
    """Flows with one or several readers, most with a gradient flowing back."""
    chance = random.Random(seed)
    n = chance.randint(2, atoms)
    p = chance.randint(1, min(n, 4))
    edges, flows = set(), []
    for u in range(n - 1):
        reach = [1] if is_chain else [1, 1, 2, 4]
        readers = {
            chance.randint(u + 1, min(n - 1, u + chance.choice(reach)))
            for _ in range(1 if is_chain else chance.randint(1, 2))
        }
        size = chance.choice([1, 5, 20, 100])
        flows.append((u, tuple(sorted(readers)), size))
        for reader in readers:
            edges.add((u, reader))
            if chance.random() < 0.8:
                flows.append((reader, (u,), size))
    return problem(
        [chance.choice([0, 10, 100, chance.randint(1, 1000)]) for _ in range(n)],
        p,
        activations=[chance.choice([0, 10, chance.randint(1, 300)]) for _ in range(n)],
        seconds=[chance.random() for _ in range(n)],
        flows=flows,
        edges=sorted(edges),
        in_flight=[min(6, p - i) for i in range(p)],
        memory_weight=chance.choice([0.0, 0.2, 0.8, 1.0]),
    )


def every_partition(given, contiguous=True):
    """All ways to spread the atoms with no empty partition."""
    p = given.num_partitions
    for chosen in itertools.product(range(p), repeat=given.num_atoms):
        if len(set(chosen)) == p and not (
            contiguous and any(chosen[u] > chosen[v] for u, v in given.edges)
        ):
            yield chosen
