"""A profile for people: what was measured, beside what had been estimated."""

from smp_tf.plan.link import Links
from smp_tf.plan.profile import Profile, Row, Times
from smp_tf.report.columns import aligned


def profile_table(profile: Profile) -> str:
    """One line for each part of the model, in milliseconds of one microbatch; then all
    of it. ``x estimate`` compares the parts' shares: 3 is three times as slow, beside
    the others, as the cost model had thought. Then the links between the ranks, where
    they were measured.
    """
    rows = [("layers", "forward ms", "backward ms", "share", "x estimate")]
    whole = sum((row.both for row in profile.rows), Times(0.0, 0.0))
    rows += [_line(row, whole) for row in profile.rows]
    forward, backward = profile.forward_seconds, profile.backward_seconds
    rows.append(("all", f"{1e3 * forward:.3f}", f"{1e3 * backward:.3f}", "", ""))
    return "\n".join([*aligned(rows), *_links(profile.links)])


def _links(links: Links) -> list[str]:
    """One line for each pair of ranks; both directions are alike."""
    if not links:
        return []
    rows = [("messages", "latency ms", "GB/s")]
    for (low, high), link in sorted(links.items()):
        if low < high:
            rows.append(
                (
                    f"ranks {low} and {high}",
                    f"{1e3 * link.latency_seconds:.3f}",
                    f"{link.bytes_per_second / 1e9:.3g}",
                )
            )
    return ["", *aligned(rows)]


def _line(row: Row, whole: Times) -> tuple[str, str, str, str, str]:
    share = row.both.measured / (whole.measured or 1.0)
    estimated = row.both.estimated / (whole.estimated or 1.0)
    return (
        _name(row.layers),
        f"{1e3 * row.forward.measured:.3f}",
        f"{1e3 * row.backward.measured:.3f}",
        f"{share:.1%}",
        f"{share / estimated:.2g}" if estimated > 0 else "?",
    )


def _name(layers: tuple[str, ...]) -> str:
    if not layers:
        return "(operations outside layers)"
    rest = len(layers) - 1
    return layers[0] + (f" (+{rest})" if rest else "")
