"""Why layers are on their partitions, in sentences."""

from collections.abc import Mapping

from smp_tf.plan.explain import TINY, Border, Move, Reason, borders
from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.layers.names import atom_names
from smp_tf.report.markup import sized


def explanation(plan: StepPlan) -> str:
    """One line for each border between partitions; empty when there is none."""
    names, lines = atom_names(plan), []
    for border in borders(plan.problem, plan.piece_of_atom):
        if _is_pinned(plan, border):
            last, first = (
                names[move.atoms[-1]] for move in (border.last, border.first)
            )
            lines.append(f"{_span(border)}: {last} | {first}, as smp.partition says")
            continue
        each = [
            f"{names[move.atoms[0]]} stays on {move.source}: {consequence(move, True)}"
            for move in (border.last, border.first)
        ]
        lines.append(f"{_span(border)}: {'; '.join(each)}")
    return "\n".join([f"why there{pieces(plan)}", *lines]) if lines else ""


def pieces(plan: StepPlan) -> str:
    """Where the pieces are that a border lies between, if they are not the ranks."""
    if plan.problem.virtual_stages == 1:
        return ""
    ranks = [str(rank) for _, rank in sorted(plan.rank_of_piece.items())]
    return f" (pieces of the model; they are on ranks {' '.join(ranks)})"


def sentences(plan: StepPlan, border: Border) -> list[tuple[str, str]]:
    """The same for the page, with the next borders at which no more would cross: (what,
    why)."""
    names = atom_names(plan)
    if _is_pinned(plan, border):
        return [("Both partitions", "were filled with smp.partition.")]
    found = [
        (f"{names[move.atoms[0]]} stays on partition {move.source}:", consequence(move))
        for move in (border.last, border.first)
    ]
    for move, edge in ((border.earlier, 0), (border.later, -1)):
        if move:
            crossing = "as few" if _cuts_alike(move) else "fewer"
            side = ("earlier, before", "later, after")[edge]
            found.append(
                (
                    f"The next border with {crossing} bytes",
                    f"is {len(move.atoms)} atoms {side} {names[move.atoms[edge]]}:"
                    f" {consequence(move)}",
                )
            )
    return [(what, f"{why}.") for what, why in found]


def notes(plan: StepPlan) -> Mapping[int, str]:
    """Atom -> sentence, for the atoms beside a border."""
    found: dict[int, list[str]] = {}
    for border in borders(plan.problem, plan.piece_of_atom):
        if not _is_pinned(plan, border):
            for move in (border.last, border.first):
                atom = move.atoms[0]
                why = f"not on partition {move.target}: {consequence(move)}"
                found.setdefault(atom, []).append(why)
    return {atom: "\n".join(each) for atom, each in found.items()}


def consequence(move: Move, briefly: bool = False) -> str:
    """What the move would do, what speaks against it first."""
    before, after = move.before, move.after
    there = f"on {move.target}"
    fullest = f"the fullest rank would hold {_shares(after.fullest, before.fullest)}"
    cut = (
        f"{sized(after.cut_bytes)} a microbatch would cross ranks instead of"
        f" {sized(before.cut_bytes)}"
    )
    if move.reason is Reason.OVER_LIMIT:
        return (
            f"{there}, a rank would need {sized(after.most_bytes)}, above the memory"
            " limit"
        )
    if move.reason is Reason.EMPTY:
        return f"partition {move.source} would be empty without it"
    if move.reason is Reason.HEAVIER:
        less = after.cut_bytes < before.cut_bytes and not briefly
        return f"{there}, {fullest}" + (f", although only {cut}" if less else "")
    if move.reason is Reason.CUTS_MORE:
        return f"{there}, {cut}"
    if move.reason is Reason.MORE_MESSAGES:
        return (
            f"{there}, {after.messages} tensors a microbatch would cross ranks instead"
            f" of {before.messages}"
        )
    if after.cut_bytes < before.cut_bytes:
        return f"nothing speaks against it: {there}, {cut}"
    if after.fullest < before.fullest * (1 - TINY):
        return f"nothing speaks against it: {there}, {fullest}"
    return "either is as good: the fullest rank holds as much, and as much crosses"


def _cuts_alike(move: Move) -> bool:
    return move.after.cut_bytes == move.before.cut_bytes


def _shares(after: float, before: float) -> str:
    digits = 2
    while digits < 6 and f"{after:.{digits}f}" == f"{before:.{digits}f}":
        digits += 1
    return f"{after:.{digits}f} instead of {before:.{digits}f} of an even share"


def _is_pinned(plan: StepPlan, border: Border) -> bool:
    moves = (border.last, border.first)
    return any(plan.atoms.atoms[move.atoms[0]].pin is not None for move in moves)


def _span(border: Border) -> str:
    return f"{border.left} | {border.left + 1}"
