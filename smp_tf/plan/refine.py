"""Better partitions by moving one atom at a time, over humps too.

A pass moves atoms between two partitions, each at most once, always the move that
leaves the best partition, even if it is worse than before; then it goes back to the
best one that was seen (Fiduccia and Mattheyses, DAC 1982). With acyclic moves only, a
contiguous partition stays one (Herrmann et al., SIAM J. Sci. Comput. 2019).
"""

from collections.abc import Iterator, Sequence

from smp_tf.plan.problem import Problem

PATIENCE = 16
"""Moves of a pass that may bring nothing better before it ends."""

MAX_SWEEPS = 20

DIGITS = 9
"""Of loads that count; all loads together weigh about 1."""

_Score = tuple[int, float, int, int]


class _State:
    """A partition with what is needed to try moves quickly."""

    def __init__(
        self, problem: Problem, chosen: Sequence[int], limit: float, contiguous: bool
    ) -> None:
        self.problem, self.limit, self.contiguous = problem, limit, contiguous
        self.chosen = list(chosen)
        self.loads = list(problem.loads(chosen))
        self.memory = list(problem.memory(chosen))
        self.count = [self.chosen.count(p) for p in range(problem.num_partitions)]
        self.cut, self.messages = problem.cut_bytes(chosen), problem.num_messages(
            chosen
        )
        self.before: list[list[int]] = [[] for _ in chosen]
        self.after: list[list[int]] = [[] for _ in chosen]
        for u, v in problem.edges:
            self.after[u].append(v)
            self.before[v].append(u)
        self.flows: list[list[int]] = [[] for _ in chosen]
        for f, flow in enumerate(problem.flows):
            for atom in (flow.source, *flow.readers):
                self.flows[atom].append(f)

    def score(self) -> _Score:
        """What a pass makes smaller: what is over the limits, then what is cut."""
        return *self._over(self.loads, self.memory), self.cut, self.messages

    def _over(self, loads: Sequence[float], memory: Sequence[int]) -> tuple[int, float]:
        most = self.problem.memory_limit
        excess = 0 if most is None else max(0, max(memory) - most)
        # Sums that are changed often drift: what is no gain must not seem one.
        return excess, round(max(0.0, max(loads) - self.limit), DIGITS)

    def may_move(self, atom: int, there: int) -> bool:
        if self.count[self.chosen[atom]] == 1:
            return False
        if not self.contiguous:
            return True
        return all(self.chosen[u] <= there for u in self.before[atom]) and all(
            self.chosen[v] >= there for v in self.after[atom]
        )

    def score_after(self, atom: int, there: int) -> _Score:
        here = self.chosen[atom]
        cut, messages = self.cut, self.messages
        for f in self.flows[atom]:
            flow = self.problem.flows[f]
            peers = {self.chosen[r] for r in flow.readers} - {self.chosen[flow.source]}
            self.chosen[atom] = there
            later = {self.chosen[r] for r in flow.readers} - {self.chosen[flow.source]}
            self.chosen[atom] = here
            cut += flow.size * (len(later) - len(peers))
            messages += len(later) - len(peers)
        loads, memory = self._moved(atom, there)
        return *self._over(loads, memory), cut, messages

    def move(self, atom: int, there: int) -> None:
        *_, self.cut, self.messages = self.score_after(atom, there)
        self.loads, self.memory = self._moved(atom, there)
        self.count[self.chosen[atom]] -= 1
        self.count[there] += 1
        self.chosen[atom] = there

    def _moved(self, atom: int, there: int) -> tuple[list[float], list[int]]:
        problem, here = self.problem, self.chosen[atom]
        loads, memory = list(self.loads), list(self.memory)
        for p, sign in ((here, -1), (there, 1)):
            count = problem.in_flight[p]
            loads[p] += sign * problem.weighted_static[atom]
            loads[p] += sign * count * problem.weighted_activations[atom]
            memory[p] += sign * problem.static_bytes[atom]
            memory[p] += sign * count * problem.activation_bytes[atom]
        return loads, memory


def refine(
    problem: Problem, chosen: Sequence[int], limit: float, contiguous: bool
) -> tuple[int, ...]:
    """Fewer bytes cut, with no load above ``limit`` if that can be.

    Args:
        chosen: a partition without empty partitions; contiguous where that is wanted.
    """
    for _ in range(MAX_SWEEPS):
        state = _State(problem, chosen, limit, contiguous)
        before, start = state.score(), chosen
        for one, other in _pairs(problem, contiguous):
            _pass(state, one, other)
        if state.score() >= before:
            return tuple(start)
        chosen = tuple(state.chosen)
    return tuple(chosen)


def _pairs(problem: Problem, contiguous: bool) -> Iterator[tuple[int, int]]:
    p = problem.num_partitions
    for one in range(p):
        for other in range(one + 1, min(p, one + 2) if contiguous else p):
            yield one, other


def _pass(state: _State, one: int, other: int) -> None:
    """Move atoms between two partitions, as long as that makes the score smaller."""
    best = state.score()
    moved: list[tuple[int, int]] = []  # (atom, where it was)
    kept = 0
    fixed: set[int] = set()
    # Without contiguity any atom may help the balance, wherever it is read.
    is_free = not state.contiguous and max(state.loads) > state.limit
    while len(moved) - kept < PATIENCE:
        moves = [
            (state.score_after(atom, there), atom, there)
            for atom, here in enumerate(state.chosen)
            if here in (one, other) and atom not in fixed
            for there in (other if here == one else one,)
            if (is_free or _is_at_border(state, atom, there))
            and state.may_move(atom, there)
        ]
        if not moves:
            break
        score, atom, there = min(moves)
        moved.append((atom, state.chosen[atom]))
        state.move(atom, there)
        fixed.add(atom)
        if score < best:
            best, kept = score, len(moved)
    for atom, here in reversed(moved[kept:]):
        state.move(atom, here)


def _is_at_border(state: _State, atom: int, there: int) -> bool:
    """Whether the atom shares a flow with that partition: no other move saves bytes."""
    for f in state.flows[atom]:
        flow = state.problem.flows[f]
        if state.chosen[flow.source] == there:
            return True
        if any(state.chosen[reader] == there for reader in flow.readers):
            return True
    return not state.flows[atom]
