"""How far from the best partition is ours?

    python benchmarks/partition_quality.py                  15 to 25 minutes
    python benchmarks/partition_quality.py --only unet,albert --partitions 2,4

Thirteen models (partition_models.py) are traced with loss and gradients, without memory
for their weights, and split into 2, 4, 8 and 16 partitions; GPT-2 XL also into 64, with
everything that a plan needs around it (attribution, segments, schedule).

The judge is tests/exact_partition.py: a mixed integer program over the same atoms, not
coarsened, that shares no code with the partitioner. Asked first for the lightest
fullest rank, then for the fewest bytes cut with no rank fuller than in OUR partition.

    load     of the fullest rank x partitions: 1 is an even share
    ours, best, bound
             our value; the smaller one of the solver's best and ours (where time runs
             out, the solver may not have found ours); what nothing goes below, proven
    ratio    ours over best
    by       how it is known: `proven` by the solver, `bound` where our load is within
             1 % of what is trivially impossible, `time` where the solver's time ran
             out: the true ratio is between the one shown and ours over bound. Of the
             bytes, `near` says that time ran out, but no partition is better in which
             every atom is at most one rank from where we put it.

The last line gives the worst ratios, of bytes only where there are any, and the seconds
of GPT-2 XL's plan for 64 partitions.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pickle
import sys
import time
from pathlib import Path

import host
from partition_models import SUITE

from smp_tf.config import Config, resolve
from smp_tf.errors import PartitionError
from smp_tf.plan.atoms import find_atoms
from smp_tf.plan.cost import atom_costs
from smp_tf.plan.graph import Graph
from smp_tf.plan.partition import partition_problem
from smp_tf.plan.plan_step import plan_step
from smp_tf.plan.problem import Problem, pose
from smp_tf.plan.roles import assign_roles

# The checkout itself is not installed, and the solver is not part of the package.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from tests.exact_partition import fewest_bytes, lightest, quick_bound  # noqa: E402

MB = 2**20
PARTITIONS = (2, 4, 8, 16)
MICROBATCHES = 16
LARGEST, MANY = "gpt2_xl", 64
CLOSE = 1.01  # to a bound that is found without searching


# --- the judgement --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Our value beside the best known; ``by`` as in the module's docstring."""

    ours: float
    best: float
    bound: float
    by: str

    @property
    def ratio(self) -> float:
        return self.ours / self.best if self.best else 1.0


@dataclasses.dataclass(frozen=True)
class Row:
    """Attributes:
    seconds: that our partitioner took.
    judging: seconds that the solver took.
    """

    name: str
    atoms: int
    partitions: int
    seconds: float
    load: Verdict
    cut: Verdict
    judging: float

    def __str__(self) -> str:
        return (
            f"{self.name:<12}{self.atoms:>5}{self.partitions:>4}{self.seconds:>7.1f}"
            f" |{_cells(self.load, '8.3f')} |{_cells(self.cut, '9.2f')}"
            f" |{self.judging:>5.0f}"
        )


HEADER = (
    f"{'graph':<12}{'atoms':>5}{'P':>4}{'ours s':>7}"
    f" |{'load':>8}{'best':>8}{'bound':>8}{'ratio':>7} {'by':<6}"
    f" |{'cut MB':>9}{'best':>9}{'bound':>9}{'ratio':>7} {'by':<6} |{'judge':>5}"
)


def _cells(verdict: Verdict, form: str) -> str:
    values = (verdict.ours, verdict.best, verdict.bound)
    numbers = "".join(format(value, form) for value in values)
    return f"{numbers}{verdict.ratio:>7.3f} {verdict.by:<6}"


def judge(name: str, problem: Problem, limit_s: float) -> Row:
    start = time.perf_counter()
    ours = partition_problem(problem)
    seconds = time.perf_counter() - start
    _require_valid(problem, ours)
    start = time.perf_counter()
    worst = max(problem.loads(ours))
    return Row(
        name,
        problem.num_atoms,
        problem.num_partitions,
        seconds,
        judge_load(problem, worst, limit_s),
        judge_cut(problem, ours, limit_s),
        time.perf_counter() - start,
    )


def _require_valid(problem: Problem, ours: tuple[int, ...]) -> None:
    assert problem.is_contiguous(ours), "an edge leads to an earlier rank"
    assert set(ours) == set(range(problem.num_partitions)), "an empty partition"


def judge_load(problem: Problem, ours: float, limit_s: float) -> Verdict:
    count = problem.num_partitions
    bound = quick_bound(problem)
    if ours <= CLOSE * bound:
        return Verdict(ours * count, ours * count, bound * count, "bound")
    found = lightest(problem, limit_s, at_most=ours)
    if found.chosen is not None:
        _require_valid(problem, found.chosen)
    best = min(found.value, ours)
    by = "proven" if found.is_proven else "time"
    return Verdict(ours * count, best * count, min(found.bound, best) * count, by)


def judge_cut(problem: Problem, ours: tuple[int, ...], limit_s: float) -> Verdict:
    cut, worst = problem.cut_bytes(ours), max(problem.loads(ours))
    found = fewest_bytes(problem, worst, limit_s)
    best, by = min(found.value, cut), "proven" if found.is_proven else "time"
    assert not (found.is_proven and math.isinf(found.value)), "ours is a solution"
    if not found.is_proven:
        near = fewest_bytes(problem, worst, limit_s, near=ours)
        best, by = min(best, near.value), "near" if near.is_proven else "time"
    bound = min(max(found.bound, 0.0), best)
    return Verdict(cut / MB, best / MB, bound / MB, by)


# --- the graphs -----------------------------------------------------------------------


def configured(partitions: int, options: argparse.Namespace) -> Config:
    wanted = {
        "partitions": partitions,
        "microbatches": max(options.microbatches, partitions),
        "optimize": options.optimize,
    }
    return resolve(wanted, partitions)


def traced(name: str, cache: Path | None) -> Graph:
    """The graph of a model; kept in the folder ``cache``, if there is one."""
    file = cache / f"{name}.graph" if cache else None
    if file and file.exists():
        return pickle.loads(file.read_bytes())
    graph = SUITE[name].trace()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(graph))
    return graph


def judge_graph(name: str, graph: Graph, options: argparse.Namespace) -> list[Row]:
    """Print a row for each number of partitions that the model has atoms for."""
    roles = assign_roles(graph)
    atoms = find_atoms(graph, roles)
    costs = atom_costs(graph, roles, atoms)
    rows = []
    for partitions in options.partitions:
        config = configured(partitions, options)
        problem = pose(graph, roles, atoms, costs, config)
        try:
            rows.append(judge(name, problem, options.seconds))
            print(rows[-1], flush=True)
        except PartitionError as error:
            print(f"{name:<12}{len(atoms.atoms):>5}{partitions:>4} {error}", flush=True)
    return rows


def plan_many(graph: Graph, options: argparse.Namespace) -> float:
    """Seconds to plan the largest model for many partitions."""
    start = time.perf_counter()
    plan_step(graph, configured(MANY, options), {}, {})
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(SUITE), help="names, with commas")
    parser.add_argument(
        "--partitions",
        type=lambda text: [int(each) for each in text.split(",")],
        default=list(PARTITIONS),
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each solve")
    parser.add_argument("--microbatches", type=int, default=MICROBATCHES)
    parser.add_argument("--optimize", default="memory", choices=["speed", "memory"])
    parser.add_argument("--cache", type=Path, help="folder to keep traced graphs in")
    parser.add_argument("--no-many", action="store_true", help=f"skip {MANY}")
    options = parser.parse_args()
    print(host.describe())
    print(
        f"optimize={options.optimize} microbatches={options.microbatches} (at least one"
        f" for each partition); {options.seconds:g} s for each solve"
    )
    print(HEADER, flush=True)
    rows: list[Row] = []
    many_s = math.nan
    for name in options.only.split(","):
        graph = traced(name, options.cache)
        rows += judge_graph(name, graph, options)
        if name == LARGEST and not options.no_many:
            many_s = plan_many(graph, options)
    load = max((row.load.ratio for row in rows), default=math.nan)
    cut = max((row.cut.ratio for row in rows if row.cut.ours), default=math.nan)
    print(f"worst_balance={load:.2f} worst_cut={cut:.2f} gpt2xl_64_s={many_s:.1f}")


if __name__ == "__main__":
    main()
