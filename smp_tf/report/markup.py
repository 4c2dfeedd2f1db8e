"""HTML and SVG as text."""

import html

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def tag(name: str, /, *children: str, **attributes: object) -> str:
    """An element; children are markup already, attributes are escaped here.

    ``class_`` is spelled without its underscore, others are hyphens: ``data_rank``.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(children)}</{name}>"


def text(content: object) -> str:
    """What a person may have named, as text: ``<b>`` is shown as it is."""
    return html.escape(str(content))


def sized(size: float) -> str:
    """Bytes with the unit that leaves one to four digits before the point."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    digits = 0 if unit == 0 or size >= 100 else 1 if size >= 9.95 else 2
    return f"{size:.{digits}f} {_UNITS[unit]}"


def timed(seconds: float) -> str:
    """Seconds with three digits that say something."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


def number(value: float) -> str:
    """A coordinate, without digits that no one can see."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
