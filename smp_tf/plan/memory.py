"""How much memory each rank of a plan needs at its fullest moment.

The rank's own schedule is gone through, action by action and piece by piece: a tensor
lives from the function that makes it, or since room was made for its arrival (see
``program.RECEIVE_AHEAD``), to the last function of the rank that reads it for the same
microbatch. What a function needs inside is found in the same way, node by node. The
batch that is fed is there all the time, whole on every rank. So 1F1B's profile (rank i
of p holds p - i microbatches), skip connections and partitions that are visited twice
come out of the plan instead of a formula.

When the step is over and its activations are gone, the optimizer's update begins:

    g      the summed gradients
    m      one temporary for each of them: Adam's new moments, or SGD's new momentum
    w      then two, without g: the numerator and the denominator of the new weights

TensorFlow orders the updates of two variables in no way, so all may be at their fullest
at once: two copies of the trained weights, where the step needed one and activations.
The plan counts both. How much of the second one there was differs from process to
process: 0.2 to 1.05 of it with Adam and 24 to 216 variables, once 1.4 with small ones,
where the allocator's rounding counts too. So this is a bound rather than a mean.

TensorFlow's allocator (BFC, with oneDNN on the CPU as on a GPU) gives a tensor a chunk
of less than twice its size rather than split it, and keeps the pages of what is freed:
18 MB take 32, 12 take 20, 32 take 32. Tensors that come and go so take more memory than
they have bytes; see ``ALLOCATOR_SHARE``.

Left out: what TensorFlow and the transport need beside tensors, and the scratch memory
inside kernels. Unknown dimensions count as 1; a tensor that every microbatch gets whole
counts for each.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from smp_tf.plan.graph import Graph, node_of
from smp_tf.plan.piece import split_segment
from smp_tf.plan.program import RECEIVE_AHEAD
from smp_tf.plan.segment import Segment
from smp_tf.plan.step_plan import StepPlan

# Their outputs are their first input, seen in another way.
_VIEWS = frozenset(
    {"Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient"}
)

ALLOCATOR_SHARE = 0.12
"""Of the activations, lost in the allocator's chunks. Measured, not derived: resident
memory beyond the plan was 7 to 26 % of the activations, 13 % on average, on the ranks
of benchmarks/plan_vs_measured.py where they are most of it."""

_UPDATE_COPIES = 2
"""Of the trained weights, while an optimizer with state changes them; see above. One
without state works in the place of the gradients."""


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weights: variables it owns.
        gradients: running sums of those that are trained.
        optimizer: state of those that are trained.
        activations: all other tensors at their peak: of all microbatches in flight, and
            the batch.
        update: what the optimizer's temporaries take beyond the gradients and the room
            that the activations have left.
        allocator: what the allocator loses in its chunks.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int = 0
    allocator: int = 0

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.update
            + self.allocator
        )


def memory_by_rank(plan: StepPlan) -> tuple[RankMemory, ...]:
    """The memory of every pp_rank; optimizer state as the plan's costs have it."""
    gradients = _summed_gradients(plan.graph)
    owner, found = plan.owner, []
    for rank in range(plan.num_partitions):
        costs = [
            cost
            for cost, partition in zip(plan.costs, plan.partition_of_atom, strict=True)
            if partition == rank
        ]
        summed = sum(
            size
            for tensor, size in gradients.items()
            if owner.get(plan.graph.gradient_of[tensor]) == rank
        )
        optimizer = sum(cost.optimizer_bytes for cost in costs)
        activations = _Walk(plan, rank, gradients).peak()
        updating = _UPDATE_COPIES * _updated_bytes(plan, rank) if optimizer else 0
        found.append(
            RankMemory(
                weights=sum(cost.weight_bytes for cost in costs),
                gradients=summed,
                optimizer=optimizer,
                activations=activations,
                update=max(updating - summed - activations, 0),
                allocator=round(ALLOCATOR_SHARE * activations),
            )
        )
    return tuple(found)


def _updated_bytes(plan: StepPlan, rank: int) -> int:
    """Weights of a rank whose gradients the step returns."""
    graph = plan.graph
    updated = {graph.gradient_of[t] for t in graph.returns if t in graph.gradient_of}
    return sum(
        graph.variables[index].spec.num_bytes
        for index in updated
        if plan.owner.get(index) == rank
    )


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

    def __init__(self, plan: StepPlan, rank: int, gradients: Mapping[str, int]) -> None:
        self.graph = plan.graph
        self.num_microbatches = plan.num_microbatches
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
        arrivals = self._arrivals()
        batch = _bytes_of(self.graph, self.graph.arguments)
        now = highest = batch * self.num_microbatches
        calls = [action for action in self.actions if action.kind.is_compute]
        for call, action in enumerate(calls):
            for stage, mb in arrivals.get(call, ()):
                now += self._hold(alive, self.received[stage], mb)
            for i, piece in enumerate(self.pieces[action.stage]):
                highest = max(highest, now + self.inner[action.stage, i])
                now += self._hold(alive, piece.outputs, action.mb)
                highest = max(highest, now)
                now -= self._release(alive, piece, action.mb)
        return highest

    def _arrivals(self) -> dict[int, list[tuple[int, int]]]:
        """Call -> (stage, microbatch) of the messages that room is made for before."""
        found: dict[int, list[tuple[int, int]]] = {}
        calls = 0
        for action in self.actions:
            calls += action.kind.is_compute
            if action.kind.is_recv:
                ahead = max(calls - RECEIVE_AHEAD, 0)
                found.setdefault(ahead, []).append((action.stage, action.mb))
        return found

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
    """Bytes that a function needs at its fullest beside its inputs: temporaries and the
    outputs made so far.

    TensorFlow runs nodes as they become ready, in no order that it promises. Two are
    tried: that of the trace, and level by level, as from a queue, where what ends the
    branches (gradients of biases and norms) waits and holds what it reads.
    """
    level: dict[str, int] = {}
    for name in piece.nodes:
        sources = map(node_of, graph.by_name[name].inputs)
        level[name] = 1 + max((level.get(source, 0) for source in sources), default=0)
    by_level = sorted(piece.nodes, key=level.__getitem__)
    return max(
        _peak_in_order(graph, dataclasses.replace(piece, nodes=tuple(nodes)))
        for nodes in (piece.nodes, by_level)
    )


def _peak_in_order(graph: Graph, piece: Segment) -> int:
    """The same, the nodes running one after the other as they stand."""
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
