"""How far a schedule in the making is: what ran, and what every rank keeps."""

from __future__ import annotations

from smp_tf.plan.pipeline import Kind, Pipeline

__all__ = ["Progress"]


class Progress:
    """How far every stage is, counted in microbatches.

    Microbatches of a stage run in ascending order, one after the other, so a
    count says which ones: `done[s] == 3` means 0, 1 and 2.

    Attributes:
        started: of each stage.
        done: of each stage; behind them, for each message, how often it arrived.
        live: for each forward stage, the microbatches whose activations it keeps.
        oldest: for each rank, the first microbatch that may be in flight there.
        newest: for each rank, the first that no stage which keeps something started.
            In flight are those from oldest up to, without, newest.
        pieces: for each rank, the sum of `live` over its stages.
        num_started: for each rank, how many actions.
        num_forwards: for each rank, how many F it started.
        num_backwards: likewise its B and I.
    """

    def __init__(self, pipeline: Pipeline, num_microbatches: int) -> None:
        stages, messages, ranks = (
            pipeline.stages,
            pipeline.messages,
            range(pipeline.num_ranks),
        )
        self.pipeline = pipeline
        self.num_microbatches = num_microbatches
        self.started = [0] * len(stages)
        self.done = [0] * (len(stages) + len(messages))
        self.live = [0] * len(stages)
        self.oldest = [0 for _ in ranks]
        self.newest = [0 for _ in ranks]
        self.pieces = [0 for _ in ranks]
        self.num_started = [0 for _ in ranks]
        self.num_forwards = [0 for _ in ranks]
        self.num_backwards = [0 for _ in ranks]
        self.by_rank: list[list[int]] = [[] for _ in ranks]
        for index, stage in enumerate(stages):
            self.by_rank[stage.rank].append(index)
        count_of = {
            (message.stage, message.peer): len(stages) + index
            for index, message in enumerate(messages)
        }
        # For each stage, the places in `done` that say whether its needs are there.
        self._needs = [
            tuple(
                need if stages[need].rank == stage.rank else count_of[need, stage.rank]
                for need in stage.needs
            )
            for stage in stages
        ]
        self._after = [stage.after for stage in stages]
        self._holders = pipeline.holders
        self._held: list[list[int]] = [[] for _ in stages]
        self._letting_go: list[set[int]] = [set() for _ in ranks]
        for index, holders in enumerate(pipeline.holders):
            self._letting_go[stages[index].rank].update(holders)
            for holder in holders:
                self._held[holder].append(index)

    def ready(self, rank: int) -> list[int]:
        """Stages of a rank whose next microbatch has all it needs."""
        started, done = self.started, self.done
        found = []
        for stage in self.by_rank[rank]:
            mb = started[stage]
            if mb == self.num_microbatches:
                continue
            for need in self._needs[stage]:
                if done[need] <= mb:
                    break
            else:
                if all(done[other] >= mb for other in self._after[stage]):
                    found.append(stage)
        return found

    def start(self, stage: int) -> None:
        """Count a microbatch that begins."""
        self.started[stage] += 1
        given = self.pipeline.stages[stage]
        rank = given.rank
        self.num_started[rank] += 1
        if given.kind is Kind.F:
            self.num_forwards[rank] += 1
        elif given.kind is not Kind.W:
            self.num_backwards[rank] += 1
        if self._holders[stage]:
            self.live[stage] += 1
            self.pieces[rank] += 1
            self.newest[rank] = max(self.newest[rank], self.started[stage])

    def end(self, stage: int) -> None:
        """Count a microbatch that is through, and let go of what it held."""
        done = self.done
        done[stage] += 1
        if not self._held[stage]:
            return
        rank = self.pipeline.stages[stage].rank
        for held in self._held[stage]:
            live = self.started[held] - min([done[h] for h in self._holders[held]])
            self.pieces[rank] += live - self.live[held]
            self.live[held] = live
        self.oldest[rank] = min([done[h] for h in self._letting_go[rank]])
