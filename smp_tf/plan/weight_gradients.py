"""What of a backward can wait: the part that only makes gradients of weights.

    dy --> MatMul(dy, W^T) --> dx, sent to the rank before      I: others wait for it
      \\--> MatMul(x^T, dy) --> gradient of W                    W: nobody does

Everything from which another rank gets something is I, by reachability in the graph.
The rest can run whenever the rank has nothing better to do; until then it holds what it
reads. So cheap operations (sums for biases and norms, reshapes) stay in I where that
leaves less to hold: what is put off are the products and what is made of them.

Source: Zero Bubble Pipeline Parallelism, arXiv 2401.10241, section 2.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

from smp_tf.plan.cost import is_product
from smp_tf.plan.graph import Graph, Node, node_of

Instance = tuple[str, int]
"""Node name, partition that runs it."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the nodes of a step run.

    Attributes:
        level: of every instance; backward ones are at ``base`` and above.
        partitions_of: node -> partitions that run it.
        source: (node name, partition) -> the instance that gives that partition its
            outputs; None for what each segment makes for itself.
        wanted: returned tensor -> partitions that get it.
    """

    graph: Graph
    level: Mapping[Instance, int]
    base: int
    partitions_of: Callable[[Node], Iterable[int]]
    source: Callable[[str, int], Instance | None]
    wanted: Mapping[str, Iterable[int]]

    def backward(self, node: Node) -> Iterator[Instance]:
        """The instances of a node that are in the backward."""
        for partition in self.partitions_of(node):
            if self.level.get((node.name, partition), -1) >= self.base:
                yield node.name, partition

    def inputs(self, node: Node, partition: int) -> Iterator[tuple[str, Instance]]:
        """Tensors that a node reads and does not make for itself."""
        for tensor in node.inputs:
            made_by = self.source(node_of(tensor), partition)
            if made_by is not None:
                yield tensor, made_by


def find_deferrable(placed: Placed) -> frozenset[Instance]:
    """Backward instances that no other rank waits for, where others of their level are
    waited for."""
    awaited = _awaited(placed)
    split = {placed.level[each] for each in awaited if each in placed.level}
    deferred: set[Instance] = set()
    for node in placed.graph.nodes:
        for here in placed.backward(node):
            can_wait = here not in awaited and placed.level[here] in split
            if can_wait and not _is_better_early(placed, node, here[1], deferred):
                deferred.add(here)
    return frozenset(deferred)


def _awaited(placed: Placed) -> set[Instance]:
    """What another rank gets something from, directly or through others."""
    found: set[Instance] = set()
    for tensor, partitions in placed.wanted.items():
        for partition in partitions:
            made_by = placed.source(node_of(tensor), partition)
            if made_by is not None and made_by[1] != partition:
                found.add(made_by)
    for node in reversed(placed.graph.nodes):
        for here in placed.backward(node):
            for _, made_by in placed.inputs(node, here[1]):
                if here in found or made_by[1] != here[1]:
                    found.add(made_by)
            if here in found:
                found.update((control, here[1]) for control in node.controls)
    return found


def _is_better_early(
    placed: Placed, node: Node, partition: int, deferred: set[Instance]
) -> bool:
    """Whether it is cheap, can run in I, and leaves no more bytes than it reads."""
    if is_product(node) or any((c, partition) in deferred for c in node.controls):
        return False
    read = 0
    for tensor, made_by in placed.inputs(node, partition):
        if made_by in deferred:
            return False
        if placed.level[made_by] >= placed.base:
            read += placed.graph.spec(tensor).num_bytes
    return sum(spec.num_bytes for spec in node.outputs) <= read
