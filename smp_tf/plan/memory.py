"""How much memory each rank of a plan needs at its fullest moment.

The rank's own schedule is gone through, action by action and piece by piece: a tensor
lives from the function that makes it, or its arrival, to the last function of the rank
that reads it for the same microbatch. What a function needs inside is
found in the same way, node by node. So 1F1B's profile (rank i of p holds p - i
microbatches), skip connections and partitions that are visited twice come out of the
plan instead of a formula.

Left out: what TensorFlow and the transport need beside tensors, and the scratch memory
inside kernels. Unknown dimensions count as 1.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from smp_tf.plan.graph import Graph, node_of
from smp_tf.plan.piece import split_segment
from smp_tf.plan.segment import Segment

if TYPE_CHECKING:
    from smp_tf.plan.step_plan import StepPlan

# Their outputs are their first input, seen in another way.
_VIEWS = frozenset(
    {"Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient"}
)


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weights: variables it owns.
        gradients: running sums of those that are trained.
        optimizer: state of those that are trained.
        activations: all other tensors at their peak, of all microbatches in flight.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_by_rank(plan: "StepPlan") -> tuple[RankMemory, ...]:
    """The memory of every pp_rank; optimizer state as the plan's costs have it."""
    gradients = _summed_gradients(plan.graph)
    owner, found = plan.owner, []
    for rank in range(plan.num_partitions):
        costs = [
            cost
            for cost, partition in zip(plan.costs, plan.partition_of_atom, strict=True)
            if partition == rank
        ]
        found.append(
            RankMemory(
                weights=sum(cost.weight_bytes for cost in costs),
                gradients=sum(
                    size
                    for tensor, size in gradients.items()
                    if owner.get(plan.graph.gradient_of[tensor]) == rank
                ),
                optimizer=sum(cost.optimizer_bytes for cost in costs),
                activations=_Walk(plan, rank, gradients).peak(),
            )
        )
    return tuple(found)


def _summed_gradients(graph: Graph) -> dict[str, int]:
    """Returned gradient -> its bytes. The parts of a sparse one are not added up: each
    microbatch's are kept, like everything else that a step returns."""
    parts: dict[int, set[str]] = {}
    for tensor in graph.returns:
        if tensor in graph.gradient_of:
            parts.setdefault(graph.gradient_of[tensor], set()).add(tensor)
    return {
        tensor: graph.spec(tensor).num_bytes
        for tensors in parts.values()
        if len(tensors) == 1
        for tensor in tensors
    }


class _Walk:
    """One rank's way through its actions."""

    def __init__(
        self, plan: "StepPlan", rank: int, gradients: Mapping[str, int]
    ) -> None:
        self.graph = plan.graph
        self.actions = plan.schedule.ranks[rank]
        self.received: dict[int, list[str]] = {}
        for cut in plan.segments.cuts:
            if cut.peer == rank:
                self.received.setdefault(cut.stage, []).append(cut.tensor)
        self.gradients = gradients
        self.pieces = {
            segment.stage: split_segment(plan.graph, segment, gradients)
            for segment in plan.segments.segments
            if segment.partition == rank
        }
        self.inner = {
            (stage, i): _peak_inside(plan.graph, piece)
            for stage, pieces in self.pieces.items()
            for i, piece in enumerate(pieces)
        }
        self.readers: dict[str, int] = {}
        for pieces in self.pieces.values():
            for piece in pieces:
                for tensor in piece.inputs:
                    self.readers[tensor] = self.readers.get(tensor, 0) + 1
        self.returned = set(plan.graph.returns) - set(gradients)

    def peak(self) -> int:
        alive: dict[tuple[str, int], int] = {}  # reads to come
        now = highest = 0
        for action in self.actions:
            if action.kind.is_recv:
                now += self._hold(alive, self.received[action.stage], action.mb)
                highest = max(highest, now)
            if not action.kind.is_compute:
                continue
            for i, piece in enumerate(self.pieces[action.stage]):
                highest = max(highest, now + self.inner[action.stage, i])
                now += self._hold(alive, piece.outputs, action.mb)
                highest = max(highest, now)
                now -= self._release(alive, piece, action.mb)
        return highest

    def _hold(
        self, alive: dict[tuple[str, int], int], tensors: Sequence[str], mb: int
    ) -> int:
        """Bytes of what was made or has arrived."""
        for tensor in tensors:
            alive[tensor, mb] = self._reads_to_come(tensor)
        return _bytes_of(self.graph, tensors)

    def _reads_to_come(self, tensor: str) -> int:
        # What the step returns, but for gradients, is kept until it ends.
        return self.readers.get(tensor, 0) + (tensor in self.returned)

    def _release(
        self, alive: dict[tuple[str, int], int], piece: Segment, mb: int
    ) -> int:
        """Bytes that nobody needs when ``piece`` is done and its gradients added."""
        freed = 0
        for tensor in piece.inputs:
            alive[tensor, mb] -= 1
        for tensor in dict.fromkeys((*piece.inputs, *piece.outputs)):
            if alive.get((tensor, mb)) == 0:
                del alive[tensor, mb]
                freed += self.graph.spec(tensor).num_bytes
        return freed


def _peak_inside(graph: Graph, piece: Segment) -> int:
    """Bytes that a function needs at its fullest beside its inputs, its nodes running
    one after the other: temporaries and the outputs made so far."""
    own = set(piece.nodes)
    source = _sources(graph, piece.nodes, own)
    last: dict[str, str] = {}
    for name in piece.nodes:
        for tensor in graph.by_name[name].inputs:
            last[source.get(tensor, tensor)] = name
    for tensor in piece.outputs:
        last[source.get(tensor, tensor)] = ""  # outlives the function
    dying: dict[str, list[str]] = {}
    for tensor, name in last.items():
        if node_of(tensor) in own:
            dying.setdefault(name, []).append(tensor)
    now = highest = 0
    for name in piece.nodes:
        made = [f"{name}:{i}" for i in range(len(graph.by_name[name].outputs))]
        kept = [tensor for tensor in made if _takes_memory(graph, tensor, source)]
        now += _bytes_of(graph, kept)
        highest = max(highest, now)
        unread = [tensor for tensor in kept if tensor not in last]
        ended = [t for t in dying.get(name, ()) if _takes_memory(graph, t, source)]
        now -= _bytes_of(graph, unread + ended)
    return highest


def _sources(graph: Graph, names: Iterable[str], own: set[str]) -> dict[str, str]:
    """View -> the tensor whose memory it shows."""
    source: dict[str, str] = {}
    for name in names:
        node = graph.by_name[name]
        if node.op in _VIEWS and node.inputs:
            first = node.inputs[0]
            source[f"{name}:0"] = source.get(first, first)
    return source


def _takes_memory(graph: Graph, tensor: str, source: Mapping[str, str]) -> bool:
    # Reading a variable does not copy it; a constant is there all the time.
    op = graph.by_name[node_of(tensor)].op
    return tensor not in source and op not in ("ReadVariableOp", "Const", "Placeholder")


def _bytes_of(graph: Graph, tensors: Sequence[str]) -> int:
    return sum(graph.spec(tensor).num_bytes for tensor in tensors)
