"""Colours of microbatches and shades of kinds; told apart by colour-blind people too.

A microbatch has a colour; what is done with it has a shade of the colour: pale for the
forward, full for the backward (B, or its first part I), dark for its second part W.
"""

from __future__ import annotations

from smp_tf.plan.pipeline import Kind

Color = tuple[float, float, float]

# After Paul Tol's "bright", in an order in which neighbours differ.
_FEW = (
    "#4477aa",
    "#ee8833",
    "#228855",
    "#cc4466",
    "#66aacc",
    "#bba522",
    "#8a5fb0",
    "#3fb8a3",
)

# Stops of a ramp with steadily growing lightness (viridis without its ends, where
# shades could not be told apart), so that the order of many microbatches is seen.
_RAMP = ("#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39")

NAMES = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward: inputs",
    Kind.W: "backward: weights",
}
_TO_WHITE = {Kind.F: 0.58, Kind.B: 0.0, Kind.I: 0.0, Kind.W: 0.0}
_TO_BLACK = {Kind.F: 0.0, Kind.B: 0.0, Kind.I: 0.0, Kind.W: 0.45}

WAITING, HATCH = "#f6f6f6", "#8f959c"
OTHER = "#d9dbde"


def is_ramp(num_microbatches: int) -> bool:
    """Whether there are so many that colours only show their order."""
    return num_microbatches > len(_FEW)


def color_of(mb: int, num_microbatches: int, kind: Kind = Kind.B) -> Color:
    """Red, green, blue, each 0..1."""
    if is_ramp(num_microbatches):
        place = mb / (num_microbatches - 1) * (len(_RAMP) - 1)
        low = min(int(place), len(_RAMP) - 2)
        base = _mixed(_rgb(_RAMP[low]), _rgb(_RAMP[low + 1]), place - low)
    else:
        base = _rgb(_FEW[mb % len(_FEW)])
    return shade(base, kind)


def shade(color: Color, kind: Kind) -> Color:
    """The colour as it stands for ``kind``."""
    lighter = _mixed(color, (1.0, 1.0, 1.0), _TO_WHITE[kind])
    return _mixed(lighter, (0.0, 0.0, 0.0), _TO_BLACK[kind])


def text_on(color: Color) -> str:
    """Black or white, whichever is read more easily."""
    red, green, blue = color
    return "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.52 else "#ffffff"


def _rgb(text: str) -> Color:
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _mixed(first: Color, second: Color, share: float) -> Color:
    red, green, blue = (a + (b - a) * share for a, b in zip(first, second))
    return red, green, blue
