"""What a user should know about a partition that works, but not well."""

from collections.abc import Sequence

from smp_tf.plan.atoms import Atom, Atoms, used_variables
from smp_tf.plan.cost import Cost
from smp_tf.plan.graph import Graph
from smp_tf.plan.problem import Problem
from smp_tf.plan.roles import Roles

NAMES_SHOWN = 4


def advise_on_atoms(
    graph: Graph,
    roles: Roles,
    atoms: Atoms,
    costs: Sequence[Cost],
    problem: Problem,
) -> tuple[str, ...]:
    """One text for each atom that no partitioner can balance.

    That is one with more than half of the model's load, or one and a half times the
    even share of a partition: the rank that has it makes all others wait.
    """
    num_partitions, loads = problem.num_partitions, problem.atom_loads
    if num_partitions == 1:
        return ()
    limit = min(0.5, 1.5 / num_partitions)
    memory = sum(cost.memory_bytes for cost in costs) or 1
    seconds = sum(cost.seconds for cost in costs) or 1.0
    found = []
    for i, (atom, cost, load) in enumerate(zip(atoms.atoms, costs, loads, strict=True)):
        if load > limit:
            why, remedy = _why_it_is_one(graph, roles, atoms, i)
            found.append(
                "one atom is too large to balance the model over"
                f" {problem.parts}: it has"
                f" {cost.memory_bytes / memory:.0%} of the bytes and"
                f" {cost.seconds / seconds:.0%} of the compute, so one rank carries"
                f" {load * num_partitions:.1f} times an even share;"
                f" layers={_names(atom.layers)}; {why}; {remedy}, or use fewer"
                " partitions"
            )
    return tuple(found)


def _why_it_is_one(
    graph: Graph, roles: Roles, atoms: Atoms, index: int
) -> tuple[str, str]:
    atom: Atom = atoms.atoms[index]
    if len(atom.layers) < 2:
        return (
            "one call of a layer is not torn apart",
            "write it as several smaller layers",
        )
    users: dict[int, set[str]] = {}
    for node in graph.nodes:
        if node.layer and atoms.atom_of.get(node.name) == index:
            for variable in used_variables(graph, roles, node):
                users.setdefault(variable, set()).add(node.layer)
    shared = [graph.variables[v].name for v, by in users.items() if len(by) > 1]
    if shared:
        return (
            f"they use the same variables={_names(shared)}",
            "give them variables of their own",
        )
    return (
        "a tensor that cannot be sent (variant, resource, unknown rank) joins them, or"
        " they are colocated",
        "pass ordinary tensors between them",
    )


def _names(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    shown = ", ".join(map(repr, names[:NAMES_SHOWN]))
    return f"[{shown}{f' and {rest} more' if rest > 0 else ''}]"
