"""Pictures of runs: what is in them, not how they look."""

import builtins
import re

import pytest

from smp_tf.errors import SmpError
from smp_tf.plan.pipeline import Kind
from smp_tf.report.timeline import colors
from smp_tf.report.timeline.page import timeline_page
from smp_tf.report.timeline.plot import timeline_plot
from smp_tf.report.timeline.rows import measured_rows, predicted_rows, stretch
from tests.unit.report.timeline.example_timelines import example_run, split_chain


def shown(svg):
    """Texts of a picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_what_the_picture_says():
    run = example_run()
    texts = shown(timeline_plot(run, "svg").decode())
    stats = run.stats
    title = next(text for text in texts if text.startswith("train_step: step "))
    assert f"bubble {stats.bubble:.1%} measured, 20.0% predicted" in title
    assert "run 37 of 0..119, the one with the median step time" in " ".join(texts)
    for kind in "FB":
        for mb in range(4):  # on two ranks, above and below
            assert texts.count(f"{kind}{mb}") == 4
    assert texts.count("rank 0") == texts.count("rank 1") == 2
    assert texts.count("ms") == 2
    legend = {"F forward", "B backward", "waiting", "other work", "microbatch 3"}
    assert legend <= set(texts)
    assert "backward: inputs" not in " ".join(texts)


def test_a_png_is_a_png_and_pictures_do_not_change():
    run = example_run()
    assert timeline_plot(run, "png").startswith(b"\x89PNG")
    assert timeline_plot(run, "svg") == timeline_plot(run, "svg")


def test_split_backwards_have_names_of_their_own():
    run = example_run(2, 3, "zero_bubble", split_chain(2))
    texts = shown(timeline_plot(run, "svg").decode())
    assert {"F0", "I0", "W0"} <= set(texts) and "B0" not in texts
    assert {"I backward: inputs", "W backward: weights"} <= set(texts)


def test_both_halves_are_busy_for_as_long():
    run = example_run(ranks=3, microbatches=6)
    above, below = measured_rows(run), predicted_rows(run)
    busy = [
        sum(box.end - box.start for row in rows for box in row.boxes)
        for rows in (above, below)
    ]
    assert busy[0] == pytest.approx(busy[1])
    assert stretch(run) == pytest.approx(busy[0] / 1000 / run.planned.busy_seconds)
    for row in below:  # what is no box is waiting
        spans = sorted([(b.start, b.end) for b in row.boxes] + list(row.waits))
        assert spans[0][0] == 0 and spans[-1][1] == pytest.approx(row.end)
        for (_, end), (start, _) in zip(spans, spans[1:]):
            assert start == pytest.approx(end)


def test_a_page_has_the_picture_and_a_row_for_each_rank():
    run = example_run(ranks=3, microbatches=12)
    picture = timeline_plot(run, "svg", with_title=False).decode()
    assert "bubble" not in picture
    page = timeline_page(run, picture)
    assert page.startswith("<!doctype html>") and page.count("<svg") == 1
    assert "<?xml" not in page and "<script" not in page
    assert page.count("<tr>") == 1 + 3
    assert "rank 0: " in page and "rank 2: " in page


@pytest.mark.parametrize("count", [1, 2, 8, 9, 128, 1000])
def test_colours_differ(count):
    found = {
        colors.color_of(mb, count, kind)
        for mb in range(count)
        for kind in (Kind.F, Kind.B, Kind.W)
    }
    assert len(found) == 3 * count
    assert all(0 <= part <= 1 for color in found for part in color)


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SmpError, match=r"pip install 'smp_tf\[plot\]'"):
        timeline_plot(example_run(), "png")
