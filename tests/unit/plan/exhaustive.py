"""The shortest schedule there is, by a search that shares no code with the scheduler.

A pipeline with its microbatches is a job shop: every (microbatch, stage) is an
operation of one machine, its rank. What the checker demands is a precedence between
operations, the limit of microbatches in flight too: as every stage takes its
microbatches in ascending order, microbatch k may start on a rank once every stage
there that lets go of microbatches is done with k - limit.

Active schedules are enumerated as by Giffler and Thompson (Operations Research 8,
1960): of the operations whose predecessors are planned, the one that could end first
names a rank; one of those that could start there before that end goes next. Some
shortest schedule is always among them. A branch ends when a lower bound says that it
cannot be shorter than what is known, or when the same operations were planned before
and nothing ended later.
"""

from smp_tf.plan.pipeline import Kind

_EPSILON = 1e-9


class Shop:
    """Operations `mb * stages + stage` with their predecessors and what is behind."""

    def __init__(self, pipeline, num_microbatches, limits=None, forwards_first=False):
        stages = pipeline.stages
        self.size = len(stages)
        self.num_microbatches = num_microbatches
        self.num_ranks = pipeline.num_ranks
        self.rank = [stage.rank for stage in stages] * num_microbatches
        self.seconds = [stage.seconds for stage in stages] * num_microbatches
        on_the_way = {(m.stage, m.peer): m.seconds for m in pipeline.messages}
        releases = [set() for _ in range(self.num_ranks)]
        forwards = [[] for _ in range(self.num_ranks)]
        for index, holders in enumerate(pipeline.holders):
            releases[stages[index].rank].update(holders)
            if stages[index].kind is Kind.F:
                forwards[stages[index].rank].append(index)
        self.before = []
        for mb in range(num_microbatches):
            for index, stage in enumerate(stages):
                found = [
                    (mb * self.size + need, on_the_way.get((need, stage.rank), 0.0))
                    for need in stage.needs
                ]
                if mb:
                    found += [
                        ((mb - 1) * self.size + other, 0.0)
                        for other in (index, *stage.after)
                    ]
                if limits is not None and pipeline.holders[index]:
                    old = mb - limits[stage.rank]
                    if old >= 0:
                        found += [
                            (old * self.size + holder, 0.0)
                            for holder in releases[stage.rank]
                        ]
                if forwards_first and stage.kind is not Kind.F:
                    last = (num_microbatches - 1) * self.size
                    found += [(last + other, 0.0) for other in forwards[stage.rank]]
                self.before.append(found)
        count = self.size * num_microbatches
        self.behind = [[] for _ in range(count)]
        for operation, found in enumerate(self.before):
            for other, way in found:
                self.behind[other].append((operation, way))
        self.order = self._topological(count)
        self.tail = [0.0] * count  # from its end to the end of all, at least
        for operation in reversed(self.order):
            for later, way in self.behind[operation]:
                self.tail[operation] = max(
                    self.tail[operation], way + self.seconds[later] + self.tail[later]
                )

    def _topological(self, count):
        missing = [len(found) for found in self.before]
        order = [operation for operation in range(count) if not missing[operation]]
        for operation in order:
            for later, _ in self.behind[operation]:
                missing[later] -= 1
                if not missing[later]:
                    order.append(later)
        assert len(order) == count, "the rules contradict each other"
        return order


def shortest(pipeline, num_microbatches, limits=None, below=float("inf"),
             forwards_first=False, most_nodes=None):  # fmt: skip
    """Return the least seconds of any schedule, or None if none is below `below`.

    Args:
        pipeline: stages and messages with their seconds.
        num_microbatches: a handful.
        limits: for each rank, the most microbatches in flight.
        below: only what is faster is of interest; this makes the search short.
        forwards_first: no rank starts a backward before its last forward.
        most_nodes: give up with an AssertionError after so many.
    """
    shop = Shop(pipeline, num_microbatches, limits, forwards_first)
    search = _Search(shop, below, most_nodes)
    search.go([None] * len(shop.order), [0.0] * shop.num_ranks, len(shop.order))
    return search.best if search.best < below else None


class _Search:
    def __init__(self, shop, below, most_nodes):
        self.shop = shop
        self.best = below
        self.nodes = 0
        self.most_nodes = most_nodes
        self.seen = {}  # planned operations -> what else ended when

    def go(self, end, free, left):
        """Plan what is left; `end` has None for what is not planned."""
        shop = self.shop
        if not left:
            self.best = min(self.best, max(free))
            return
        self.nodes += 1
        assert self.most_nodes is None or self.nodes <= self.most_nodes, self.nodes
        earliest = self._earliest(end, free)
        if earliest is None or self._is_seen(end, free):
            return
        ready = [
            operation
            for operation in shop.order
            if end[operation] is None
            and all(end[other] is not None for other, _ in shop.before[operation])
        ]
        first = min(ready, key=lambda o: (earliest[o] + shop.seconds[o], o))
        until, rank = earliest[first] + shop.seconds[first], shop.rank[first]
        choices = [
            operation
            for operation in ready
            if operation == first
            or (shop.rank[operation] == rank and earliest[operation] < until - _EPSILON)
        ]
        if shop.seconds[first] == 0.0:
            choices = [first]
        choices.sort(key=lambda o: (earliest[o], -shop.tail[o]))
        before = free[rank]
        for operation in choices:
            end[operation] = free[rank] = earliest[operation] + shop.seconds[operation]
            self.go(end, free, left - 1)
            end[operation] = None
            free[rank] = before

    def _earliest(self, end, free):
        """Return the earliest start of all operations, or None if it is too late."""
        shop = self.shop
        earliest = [0.0] * len(end)
        limit = self.best - _EPSILON
        open_on = [[] for _ in free]
        for operation in shop.order:
            if end[operation] is not None:
                continue
            start = free[shop.rank[operation]]
            for other, way in shop.before[operation]:
                done = end[other]
                if done is None:
                    done = earliest[other] + shop.seconds[other]
                if done + way > start:
                    start = done + way
            earliest[operation] = start
            if start + shop.seconds[operation] + shop.tail[operation] >= limit:
                return None
            open_on[shop.rank[operation]].append(operation)
        for operations in open_on:
            if self._is_late(operations, earliest, limit):
                return None
        return earliest

    def _is_late(self, operations, earliest, limit):
        """Whether one rank alone cannot do it: Jackson's bound on suffixes."""
        shop = self.shop
        by_start = sorted(operations, key=lambda o: earliest[o], reverse=True)
        work, tail = 0.0, float("inf")
        for operation in by_start:
            work += shop.seconds[operation]
            tail = min(tail, shop.tail[operation])
            if earliest[operation] + work + tail >= limit:
                return True
        # Tails differ: those with long ones first, from the earliest start on.
        if by_start:
            start = earliest[by_start[-1]]
            for operation in sorted(operations, key=lambda o: -shop.tail[o]):
                start += shop.seconds[operation]
                if start + shop.tail[operation] >= limit:
                    return True
        return False

    def _is_seen(self, end, free):
        shop = self.shop
        planned = tuple(
            operation for operation in range(len(end)) if end[operation] is not None
        )
        times = (
            *free,
            *(
                end[operation]
                for operation in planned
                if any(end[later] is None for later, _ in shop.behind[operation])
            ),
        )
        known = self.seen.setdefault(planned, [])
        for other in known:
            if all(a <= b + _EPSILON for a, b in zip(other, times)):
                return True
        known[:] = [
            other for other in known if any(a > b for a, b in zip(other, times))
        ]
        known.append(times)
        return False
