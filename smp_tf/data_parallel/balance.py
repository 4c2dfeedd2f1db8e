"""Which replica keeps the optimizer's state of which variable.

The largest variables first, each to the replica that has least so far:

    bytes     90  10  40  50  30        replica 0   90 + 30
    replica    0   1   1   1   0        replica 1   50 + 40 + 10

So no replica has more than 4/3 of what the best division would give the fullest one
(R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
"""

from collections.abc import Sequence


def balanced(num_bytes: Sequence[int], loads: Sequence[int]) -> list[int]:
    """Give each variable to a replica, such that all have about as many bytes.

    Args:
        num_bytes: of each variable.
        loads: bytes that each replica has already.

    Returns:
        A replica for each variable; the same ones for the same arguments.
    """
    totals, found = list(loads), [0] * len(num_bytes)
    by_size = sorted(range(len(num_bytes)), key=lambda i: (-num_bytes[i], i))
    for i in by_size:
        # A variable of no bytes still counts, else one replica would have all of them.
        found[i] = totals.index(min(totals))
        totals[found[i]] += max(num_bytes[i], 1)
    return found
