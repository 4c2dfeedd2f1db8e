"""How much faster is a pipeline of two ranks than one process?

    python benchmarks/pipeline_speedup.py
    python benchmarks/pipeline_speedup.py --torch-python /path/of/another/bin/python

A stack of GPT blocks, one step (loss and gradients) over M microbatches: in one process
on one core, a plain `tf.function` without smp_tf that runs them one after the other;
and on two ranks of smp_tf, each pinned to a core, with every schedule. Where PyTorch
can be imported, the same stack through torch.distributed.pipelining over Gloo, against
PyTorch in one process. All processes are started once and take turns in every round;
whoever has no turn sleeps, and a turn is repeated if something else ran on the machine
meanwhile. Loss and gradients are compared with those of one process.

    one, pipeline   ms of a step, medians of the rounds; one process runs first and
                    last in a round, which takes the mean
    speed-up        median of the rounds' ratios one / pipeline
    best            the fastest of one / the fastest of pipeline
    of ideal        speed-up / (2 M / (M + 1)), which is what 1F1B and GPipe could reach
    plan            the speed-up that smp_tf's plan expects
    split           compute of rank 0 : rank 1 in the plan, %
    core ms         time of each rank on its core; the rest of the step it waited
    work            that of both ranks / that of one process
    memory          activations of the fullest rank in the plan / those of interleaved

A 1F1B on two ranks loses 1 / (M + 1) to the bubble; what is lost beyond that is split
(the fuller rank), work (computing itself takes longer than in one process) or waiting.
"crowding" is how much longer one process takes while another one runs the same on the
other core: no pipeline can be better than the ideal over that.

The last line: share of the ideal of interleaved at M = 8; speed-up of zero bubble at
M = 4, the better one of those within 1.5 times interleaved's activations; PyTorch's
1F1B at M = 8. "nan" stands for what was not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import host
import numpy as np
import pipeline_teams as teams

HERE = Path(__file__).resolve().parent
MICROBATCHES = (1, 4, 8, 16)
BASE = "interleaved"  # its activations are what others' are compared with
CROWDED_UP_TO = 4  # microbatches with which one process is also run on both cores
MOST_MEMORY = 1.5
TOLERANCE = 1e-4  # of the largest entry of a gradient; float32, another order of sums
TORCH = "torch_"
TORCH_SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zbv")
# The default weight of memory moves work away from the rank with most activations.
CONFIG = {"partitions": teams.RANKS, "optimize": "speed", "memory_weight": 0.0}


@dataclasses.dataclass
class Contest:
    """A pipeline against one process, for one number of microbatches."""

    framework: str
    schedule: str
    microbatches: int
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    one: list[Any] = dataclasses.field(default_factory=list)  # [round][run]
    ranks: list[Any] = dataclasses.field(default_factory=list)

    @property
    def ideal(self) -> float:
        return 2 * self.microbatches / (self.microbatches + 1)

    @property
    def speedup(self) -> float:
        pairs = zip(self.one, self.ranks, strict=True)
        return statistics.median(seconds(a) / span(b) for a, b in pairs)

    def row(self, base: dict[str, Any]) -> list[str]:
        one = [seconds(each) for each in self.one]
        pipeline = [span(each) for each in self.ranks]
        core = statistics.median(run[2] for each in self.one for run in each)
        busy = [
            1e3 * statistics.median(each[rank][2] for each in self.ranks)
            for rank in range(teams.RANKS)
        ]
        work = statistics.median(sum(r[2] for r in each) for each in self.ranks)
        cells = [self.framework, self.schedule, str(self.microbatches)]
        cells += [f"{1e3 * statistics.median(each):.0f}" for each in (one, pipeline)]
        cells += [f"{self.speedup:.3f}", f"{min(one) / min(pipeline):.3f}"]
        cells += [f"{self.speedup / self.ideal:.3f}"]
        if self.plan:
            shares = [100 * each / sum(self.plan["work"]) for each in self.plan["work"]]
            cells += [f"{self.plan['speedup']:.3f}"]
            cells += [":".join(f"{share:.1f}" for share in shares)]
        else:
            cells += ["-", "-"]
        cells += [" ".join(f"{each:.0f}" for each in busy), f"{work / core:.3f}"]
        memory = self.memory(base)
        return cells + ["-" if math.isnan(memory) else f"{memory:.2f}"]

    def memory(self, base: dict[str, Any]) -> float:
        """Activations over those of the plan `base`; NaN if one is not known."""
        if not self.plan or not base:
            return math.nan
        return float(self.plan["activations"] / base["activations"])


VARIANT = re.compile(r"(?P<pipeline>[a-z_]+)(@(?P<active>\d+))?(x(?P<virtual>\d+))?")


def config_of(schedule: str) -> dict[str, Any]:
    """Keys of smp.init for, say, "zero_bubble", "zero_bubble@3", "interleaved@4x2"."""
    found = VARIANT.fullmatch(schedule)
    if found is None:
        sys.exit(f"no such schedule: {schedule}")
    config: dict[str, Any] = {"pipeline": found["pipeline"]}
    if found["active"]:
        config["active_microbatches"] = int(found["active"])
    if found["virtual"]:
        config["virtual_stages"] = int(found["virtual"])
    return config


HEADER = (
    *("framework", "schedule", "M", "one ms", "pipeline ms", "speed-up", "best"),
    *("of ideal", "plan", "split", "core ms", "work", "memory"),
)
WIDTHS = (9, 16, 3, 8, 11, 8, 7, 8, 7, 10, 11, 7, 7)


def line(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS))


def span(runs: Sequence[tuple[float, float, float]]) -> float:
    """Seconds from the first start to the last end."""
    return max(run[1] for run in runs) - min(run[0] for run in runs)


def seconds(runs: Sequence[tuple[float, float, float]]) -> float:
    """Of one process in a round: the mean of its runs."""
    return statistics.mean(span([run]) for run in runs)


# --- the two frameworks ---------------------------------------------------------------


class TensorFlow:
    """The teams of smp_tf, one for each schedule, and the plain stack."""

    name = "smp_tf"

    def __init__(
        self, schedules: Sequence[str], folder: Path, config: dict[str, Any]
    ) -> None:
        script = str(HERE / "pipeline_tf.py")
        plain = [[sys.executable, script, "plain", str(r)] for r in range(teams.RANKS)]
        self.schedules = tuple(schedules)
        self.teams = [teams.Team("plain", plain, teams.RANKS, folder)]
        self._of: dict[str, teams.Team] = {}
        for name in schedules:
            more = config_of(name)
            command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo"]
            command += ["-np", str(teams.RANKS), sys.executable, script, "ranks"]
            command += [json.dumps({**CONFIG, **config, **more})]
            self._of[name] = teams.Team(name, [command], teams.RANKS, folder)
            self.teams.append(self._of[name])

    def prepare(self, num_microbatches: int) -> list[Contest]:
        """Build every step, compare what it computes; those to be timed."""
        self.teams[0].ask("prepare", num_microbatches)
        expected = merged(self.teams[0].ask("results", only=0))
        found = []
        for name in self.schedules:
            plan = self._of[name].ask("prepare", num_microbatches)[0]
            given = merged(self._of[name].ask("results"), plan["variables"])
            require_equal(f"{name}, M={num_microbatches}", given, expected)
            found.append(Contest(self.name, name, num_microbatches, plan))
        return found

    def run_one(self) -> list[Any]:
        return self.teams[0].ask("run", only=0)

    def run_both(self) -> list[Any]:
        return self.teams[0].ask("run")

    def run(self, schedule: str) -> list[Any]:
        return self._of[schedule].ask("run")


class Torch:
    """The team of PyTorch, which knows all schedules and the plain stack."""

    name = "torch"

    def __init__(self, python: str, schedules: Sequence[str], folder: Path) -> None:
        script, store = str(HERE / "pipeline_torch.py"), str(folder / "store")
        commands = [[python, script, str(rank), store] for rank in range(teams.RANKS)]
        self.teams = [teams.Team("torch", commands, teams.RANKS, folder)]
        self.schedules = tuple(schedules)
        self.version = self.teams[0].ask("version")[0]

    def prepare(self, num_microbatches: int) -> list[Contest]:
        """Like TensorFlow's."""
        team = self.teams[0]
        team.ask("prepare", "plain", num_microbatches)
        expected = merged(team.ask("results", "plain", only=0))
        names = team.ask("names", only=0)[0]
        found = []
        for name in self.schedules:
            if not all(team.ask("prepare", name, num_microbatches)):
                continue
            given = merged(team.ask("results", name), names)
            require_equal(f"torch {name}, M={num_microbatches}", given, expected)
            found.append(Contest(self.name, name, num_microbatches))
        return found

    def run_one(self) -> list[Any]:
        return self.teams[0].ask("run", "plain", only=0)

    def run_both(self) -> list[Any]:
        return self.teams[0].ask("run", "plain")

    def run(self, schedule: str) -> list[Any]:
        return self.teams[0].ask("run", schedule)


def merged(
    results: Sequence[tuple[float, dict[str, np.ndarray]]],
    names: Sequence[str] | None = None,
) -> tuple[float, list[np.ndarray]]:
    """Loss and all gradients of a step, from what each rank has of them.

    Args:
        names: of the variables in the order of the model; that of one rank if not said.
    """
    loss = next(loss for loss, _ in results if not math.isnan(loss))
    gradients = {name: each for _, some in results for name, each in some.items()}
    return loss, [gradients[name] for name in names or gradients]


def require_equal(
    what: str,
    given: tuple[float, Sequence[np.ndarray]],
    expected: tuple[float, Sequence[np.ndarray]],
) -> None:
    """Stop if a pipeline does not compute what one process does."""
    errors = [abs(given[0] / expected[0] - 1)]
    errors += [
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(given[1], expected[1], strict=True)
    ]
    if not max(errors) < TOLERANCE:  # NaN is no success
        sys.exit(f"{what}: differs from one process, relative errors {errors}")


# --- the contest ----------------------------------------------------------------------


def compare(
    frameworks: Sequence[Any],
    num_microbatches: int,
    repeats: int,
    referee: teams.Referee,
) -> list[Contest]:
    """All contests with so many microbatches; every second round runs backwards."""
    contests = {each: each.prepare(num_microbatches) for each in frameworks}
    crowded: dict[Any, list[float]] = {each: [] for each in frameworks}
    for round_index in range(repeats):
        for framework, turns in contests.items():
            one = referee.watch(framework.run_one)
            for contest in turns[:: -1 if round_index % 2 else 1]:
                run = functools.partial(framework.run, contest.schedule)
                contest.ranks.append(referee.watch(run))
            if num_microbatches <= CROWDED_UP_TO:
                runs = referee.watch(framework.run_both)
            # Once more, as the machine's speed drifts while the pipelines run.
            one += referee.watch(framework.run_one)
            for contest in turns:
                contest.one.append(one)
            if num_microbatches <= CROWDED_UP_TO:
                both = statistics.mean(span([each]) for each in runs)
                crowded[framework].append(both / seconds(one))
    rows = [contest for turns in contests.values() for contest in turns]
    base = next((each.plan for each in rows if each.schedule == BASE), {})
    for contest in rows:
        print(line(contest.row(base)), flush=True)
    for framework, ratios in crowded.items():
        if ratios and contests[framework]:
            print(f"{framework.name:>9} crowding: {statistics.median(ratios):.3f}")
    return rows


def summary(rows: Sequence[Contest]) -> str:
    def at(framework: str, num_microbatches: int) -> dict[str, Contest]:
        return {
            row.schedule: row
            for row in rows
            if (row.framework, row.microbatches) == (framework, num_microbatches)
        }

    four = at("smp_tf", 4)
    base = four[BASE].plan if BASE in four else {}
    affordable = [
        row.speedup
        for name, row in four.items()
        if name.startswith("zero_bubble") and row.memory(base) <= MOST_MEMORY
    ]
    eff, torch = (
        found[name].speedup / found[name].ideal if name in found else math.nan
        for found, name in ((at("smp_tf", 8), BASE), (at("torch", 8), "1f1b"))
    )
    best = max(affordable, default=math.nan)
    return (
        f"eff_1f1b_m8={eff:.3f} speedup_zb_m4={best:.3f} torch_1f1b_eff_m8={torch:.3f}"
    )


def known_schedules() -> list[str]:
    """Those of smp_tf: zero bubble also with less memory, and in a V."""
    sys.path.insert(0, str(HERE.parent))
    from smp_tf.plan.schedules import NAMES

    return [*NAMES, "zero_bubble@3", "zero_bubble@3x2"]


def can_import_torch(python: str) -> bool:
    probe = "import torch.distributed.pipelining"
    return not subprocess.run([python, "-c", probe], capture_output=True).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="rounds for each M")
    parser.add_argument(
        "--patience",
        type=float,
        default=120,
        help="seconds for repeating turns during which others used the machine",
    )
    parser.add_argument("--microbatches", type=int, nargs="+", default=MICROBATCHES)
    parser.add_argument(
        "--schedules",
        nargs="+",
        help="of smp_tf (zero_bubble@3x2: 3 active microbatches, 2 virtual stages) and "
        + "of PyTorch: "
        + " ".join(TORCH + name for name in TORCH_SCHEDULES),
    )
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter that has PyTorch"
    )
    parser.add_argument(
        "--config", type=json.loads, default={}, help="JSON, more keys of smp.init"
    )
    parser.add_argument("--plans", action="store_true", help="print partition tables")
    options = parser.parse_args()

    torch_names = [TORCH + name for name in TORCH_SCHEDULES]
    chosen = options.schedules or [*known_schedules(), *torch_names]
    ours = [name for name in chosen if not name.startswith(TORCH)]
    theirs = [name.removeprefix(TORCH) for name in chosen if name.startswith(TORCH)]
    print(host.describe())
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, frameworks = Path(name), []
        started: list[teams.Team] = []
        stack.enter_context(teams.closing(started))
        if ours:
            frameworks.append(TensorFlow(ours, folder, options.config))
            started += frameworks[-1].teams
        if theirs and can_import_torch(options.torch_python):
            frameworks.append(Torch(options.torch_python, theirs, folder))
            started += frameworks[-1].teams
            print(f"torch={frameworks[-1].version}")
        elif theirs:
            print(f"torch: cannot be imported by {options.torch_python}; left out")
        print(
            f"{teams.BLOCKS} blocks, dim {teams.DIM}, {teams.HEADS} heads, sequence"
            f" {teams.LENGTH}, {teams.EXAMPLES} examples per microbatch;"
            f" {options.repeats} rounds"
        )
        print(line(HEADER))
        rows = []
        referee = teams.Referee(options.patience)
        for num_microbatches in options.microbatches:
            rows += compare(frameworks, num_microbatches, options.repeats, referee)
        print(f"turns={referee.turns} disturbed_by_others={referee.disturbed}")
        if options.plans:
            for row in rows:
                for key in ("table", "schedule", "stages") if row.plan else ():
                    print(f"{row.schedule}, M={row.microbatches}\n{row.plan[key]}")
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
