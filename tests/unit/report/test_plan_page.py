"""The page without a browser: what it contains, and that it is well formed.

``tests/browser`` looks at it.
"""

import dataclasses
import html.parser

import pytest

from smp_tf.plan.ranking import ranked
from smp_tf.report.plan_page import plan_page
from tests.unit.plan.example_graphs import chain, residual, tied, used_twice
from tests.unit.report.example_pages import forecast_of, hostile_names

VOID = {"meta"}


class Outline(html.parser.HTMLParser):
    """Refuses tags that are not closed, or in another order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.shown = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), "an attribute twice"
        self.ids += [value for key, value in attributes if key == "id"]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" not in self.open:
            self.shown.append(data)


@pytest.mark.parametrize(
    "step, partitions",
    [(chain(3), 1), (chain(12), 4), (residual(5), 3), (tied(), 2), (used_twice(), 2)],
    ids=["one", "chain", "residual", "tied", "forward only"],
)
def test_pages_are_well_formed(step, partitions):
    page = plan_page(forecast_of(step, partitions))
    assert page.startswith("<!doctype html>\n<html")
    sections = Outline(page).ids
    assert sections[0] == "layers" and {"memory", "timeline"} <= set(sections)
    assert ("reasons" in sections) == ("crossing" in sections) == (partitions > 1)
    assert "ranking" not in sections


def test_names_are_escaped():
    shown = "".join(Outline(hostile_names()).shown)
    assert '<b>&"1"' in shown and "<b>&amp;" not in hostile_names()


def test_the_same_plan_gives_the_same_page():
    assert hostile_names() == hostile_names()


def test_a_limit_that_is_kept_and_one_that_is_not():
    forecast = forecast_of(chain(6), 2)
    worst = forecast.schedules[0].worst_bytes
    shown = "".join(Outline(plan_page(forecast, memory_limit=worst)).shown)
    assert "fits" in shown and "over the limit" not in shown
    shown = "".join(Outline(plan_page(forecast, memory_limit=worst - 1)).shown)
    assert "does not fit" in shown and "1 B too much" in shown
    assert "over the limit" in shown


def test_the_ranking_is_cut_short():
    forecasts = [forecast_of(chain(14), p) for p in range(1, 13)]
    page = plan_page(forecasts[0], ranked(forecasts))
    outline = Outline(page)
    assert "ranking" in outline.ids
    assert any("2 more are left out" in text for text in outline.shown)


def test_warnings_are_shown():
    forecast = forecast_of(chain(4), 2)
    plan = dataclasses.replace(forecast.plan, advice=("one atom is <too> large",))
    page = plan_page(dataclasses.replace(forecast, plan=plan))
    assert "one atom is &lt;too&gt; large" in page


def test_many_microbatches_stay_readable():
    """Each action keeps some pixels; the picture is scrolled."""
    page = plan_page(forecast_of(chain(8), 4, microbatches=64))
    assert page.count('class="action forward"') == 4 * 64
    assert len(page) < 10**6
