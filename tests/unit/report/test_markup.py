"""Markup, and numbers as people read them."""

import pytest

from smp_tf.report.markup import number, sized, tag, text, timed


def test_elements():
    assert tag("b", "x", "y", class_="p0", data_rank=1) == (
        '<b class="p0" data-rank="1">xy</b>'
    )
    assert tag("i", title='<"&') == '<i title="&lt;&quot;&amp;"></i>'
    assert text("<b>&") == "&lt;b&gt;&amp;"


@pytest.mark.parametrize(
    "size, shown",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1536, "1.50 KiB"),
        (256 * 2**10, "256 KiB"),
        (12.5 * 2**20, "12.5 MiB"),
        (9.99 * 2**20, "10.0 MiB"),
        (3 * 2**40, "3.00 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_sizes(size, shown):
    assert sized(size) == shown


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0, "0 s"),
        (2.5, "2.5 s"),
        (0.0123, "12.3 ms"),
        (4.5e-5, "45 µs"),
        (3e-8, "30 ns"),
    ],
)
def test_times(seconds, shown):
    assert timed(seconds) == shown


def test_coordinates():
    assert [number(x) for x in (1.0, 0.126, 10, 1 / 3)] == ["1", "0.13", "10", "0.33"]
