"""Which rank has which piece of a model that is cut into more pieces than ranks.

A rank with several pieces has *virtual stages*: every microbatch visits it once for
each. Three ranks, two pieces each:

    piece   0  1  2  3  4  5
    loop    0  1  2  0  1  2      Megatron-LM, arXiv 2104.04473, section 2.2
    wave    0  1  2  2  1  0      V of Zero Bubble, arXiv 2401.10241, section 6

In a loop all pieces pass on to the next rank. In a wave the first and last pieces are
on one rank, so that its backwards begin early, and a turn needs no message.
"""

from __future__ import annotations

from smp_tf.errors import ScheduleError

__all__ = ["PLACEMENTS", "rank_of_piece"]

PLACEMENTS = ("loop", "wave")


def rank_of_piece(
    num_ranks: int, virtual_stages: int, placement: str = "loop"
) -> tuple[int, ...]:
    """Return the rank of each piece, in the order in which a microbatch visits them.

    Args:
        num_ranks: at least 1.
        virtual_stages: pieces for each rank, at least 1.
        placement: one of PLACEMENTS.

    Raises:
        ScheduleError: a number is below 1, or no placement has this name.
    """
    if num_ranks < 1 or virtual_stages < 1:
        raise ScheduleError(
            "every rank has at least one piece, and there is at least one rank; "
            f"num_ranks={num_ranks}, virtual_stages={virtual_stages}"
        )
    if placement not in PLACEMENTS:
        raise ScheduleError(
            f"no such placement; placement={placement!r}; use one of {PLACEMENTS}"
        )
    down = range(num_ranks)
    found: list[int] = []
    for visit in range(virtual_stages):
        found += reversed(down) if placement == "wave" and visit % 2 else down
    return tuple(found)
