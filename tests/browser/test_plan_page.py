"""The plan page as a person sees it: opened in a headless browser and measured."""

import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.examples import char_gpt
from smp_tf.plan.dry_run import dry_run
from smp_tf.plan.pipeline import Kind
from smp_tf.plan.schedules import NAMES
from smp_tf.report.markup import sized, timed
from tests.browser.chromium import contrast, measure, needs_chromium, overlap, width
from tests.unit.report.example_pages import hostile_names, skipping

pytestmark = [needs_chromium, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
PARTITIONS, MICROBATCHES, BATCH = 3, 4, 8
LIMIT = 10**7

SELECTORS = {
    "title": "h1",
    "facts": ".facts > div",
    "lanes": ".lane",
    "boxes": ".box",
    "names": ".box bdi",
    "small": ".box small",
    "bars": ".box .bar i",
    "labels": ".crossing text",
    "crossing": ".crossing",
    "stacks": ".stack",
    "weights": ".stack .weights",
    "gradients": ".stack .gradients",
    "optimizer": ".stack .optimizer",
    "activations": ".stack .activations",
    "allocator": ".stack .allocator",
    "limits": ".stack u",
    "timeline": "#timeline h2",
    "rows": ".timeline g[data-rank]",
    "idle": ".timeline .idle",
    "actions": ".timeline .action > rect",
    "groups": ".timeline .action",
    "forward": ".timeline .forward text",
    "backward": ".timeline .backward text",
    "borders": ".border",
    "reasons": ".border li",
    "ranking": "#ranking tbody tr",
    "headings": "h2",
    "paragraphs": "section > p",
}


@pytest.fixture(scope="module")
def forecast():
    """What the command plans, for the numbers that the page has to show."""
    tf.keras.backend.clear_session()  # automatic names as in a new process
    step, batch = char_gpt.build(BATCH)
    return smp.plan(step, batch, partitions=PARTITIONS, microbatches=MICROBATCHES)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Written by the command, as a user has it."""
    path = tmp_path_factory.mktemp("page") / "plan.html"
    options = f"--partitions {PARTITIONS} --microbatches {MICROBATCHES}"
    options += f" --batch {BATCH} --memory-limit {LIMIT} --html {path}"
    result = subprocess.run(
        [sys.executable, "-m", "smp_tf", "plan", "smp_tf.examples.char_gpt:build"]
        + options.split(),
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert f"wrote {path}" in result.stdout, result.stderr
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def seen(page, tmp_path_factory):
    return measure(page, tmp_path_factory.mktemp("light"), **SELECTORS)


def test_it_needs_nothing_but_itself(page, seen):
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert "<script" not in page and "src=" not in page
    assert seen["resources"] == [] and seen["console"] == []


def test_every_layer_is_a_box_in_the_lane_of_its_partition(seen, forecast):
    plan, lanes = forecast.plan, seen["lanes"]
    assert [lane["data"]["partition"] for lane in lanes] == list("012")
    atoms = {}
    for box in seen["boxes"]:
        assert width(box) > 50 and box["bottom"] - box["top"] > 20
        assert box["on_top"], f"something lies over {box['text']}"
        lane = lanes[int(box["data"]["partition"])]
        assert lane["left"] <= box["left"] and box["right"] <= lane["right"]
        assert lane["top"] <= box["top"] and box["bottom"] <= lane["bottom"]
        for atom in map(int, box["data"]["atoms"].split()):
            atoms[atom] = int(box["data"]["partition"])
    assert [atoms[i] for i in sorted(atoms)] == list(plan.partition_of_atom)
    told = "\n".join(box["title"] for box in seen["boxes"])
    assert all(layer in told for atom in plan.atoms.atoms for layer in atom.layers)


def test_boxes_and_lanes_do_not_overlap(seen):
    for kind in ("boxes", "lanes"):
        for one, other in itertools.combinations(seen[kind], 2):
            assert not overlap(one, other), (one["text"], other["text"])


def test_partitions_are_told_apart_by_colour(seen):
    colours = {}
    for box in seen["boxes"]:
        colours.setdefault(box["data"]["partition"], set()).add(
            tuple(box["background"])
        )
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == PARTITIONS


def test_bars_of_layers_are_as_long_as_their_bytes(seen):
    sizes = [int(box["data"]["bytes"]) for box in seen["boxes"]]
    longest = max(map(width, seen["bars"]))
    for bar, size in zip(seen["bars"], sizes, strict=True):
        assert math.isclose(width(bar), longest * size / max(sizes), abs_tol=0.5)


def test_no_name_is_cut_off_and_no_label_covered(seen):
    assert not [name["text"] for name in seen["names"] if name["is_cut"]]
    labels = seen["labels"]
    for one, other in itertools.combinations(labels, 2):
        assert not overlap(one, other), (one["text"], other["text"])
    for label, box in itertools.product(labels, seen["boxes"]):
        assert not overlap(label, box), (label["text"], box["text"])


def test_what_crosses_forward_is_drawn_and_labelled(seen, forecast):
    """All but the loss, which is returned and read by no layer."""
    plan = forecast.plan
    loss = set(plan.graph.returns)
    expected = sum(
        cut.spec.num_bytes
        for cut in forecast.cuts
        if plan.segments.segments[cut.stage].kind is Kind.F and cut.tensor not in loss
    )
    sizes = [int(line["data"]["bytes"]) for line in seen["crossing"]]
    assert sum(sizes) == expected > 0
    assert [label["text"] for label in seen["labels"]] == list(map(sized, sizes))
    # The weights of the embedding are used again at the end: one line leads back.
    assert sum("return" in line["classes"] for line in seen["crossing"]) == 1


def test_memory_is_drawn_to_scale_with_the_limit(seen, forecast):
    scale = max([LIMIT, *(each.total for each in forecast.memory)])
    for rank, (each, stack) in enumerate(
        zip(forecast.memory, seen["stacks"], strict=True)
    ):
        left = stack["left"]
        for part in ("weights", "gradients", "optimizer", "activations", "allocator"):
            bar = seen[part][rank]
            size = getattr(each, part)
            assert math.isclose(bar["left"], left, abs_tol=0.5)
            assert math.isclose(width(bar), width(stack) * size / scale, abs_tol=0.5)
            left += width(bar)
        limit = seen["limits"][rank]
        place = stack["left"] + width(stack) * LIMIT / scale
        assert limit["left"] - 1 <= place <= limit["right"] + 1 and limit["on_top"]


def test_the_timeline_has_each_action_at_its_time(seen, forecast):
    plan = forecast.plan
    pipeline = plan.segments.pipeline()
    seconds = [stage.seconds for stage in pipeline.stages]

    def duration(action):
        return seconds[action.stage] if action.kind.is_compute else 0.0

    ends = dry_run(plan.schedule, pipeline, duration)
    expected = [
        (str(action), end - duration(action), end)
        for actions, times in zip(plan.schedule.ranks, ends, strict=True)
        for action, end in zip(actions, times, strict=True)
        if action.kind.is_compute
    ]
    assert [g["data"]["action"] for g in seen["groups"]] == [a for a, _, _ in expected]
    scale = width(seen["idle"][0]) / plan.report.seconds
    start = seen["idle"][0]["left"]
    for box, (action, begin, end) in zip(seen["actions"], expected, strict=True):
        assert math.isclose(box["left"], start + begin * scale, abs_tol=0.6), action
        assert math.isclose(box["right"], start + end * scale, abs_tol=0.6), action


def test_ranks_do_one_thing_at_a_time_and_the_bubble_is_what_is_left(seen, forecast):
    stages = Counter(s.partition for s in forecast.plan.segments.segments)
    rows = [
        [box for box in seen["actions"] if overlap(box, idle)] for idle in seen["idle"]
    ]
    assert len(rows) == PARTITIONS
    busy = 0.0
    for rank, row in enumerate(rows):
        assert len(row) == MICROBATCHES * stages[rank]
        for one, other in itertools.combinations(row, 2):
            assert not overlap(one, other, allowed=0.6)
        busy += sum(map(width, row))
    bubble = 1 - busy / (PARTITIONS * width(seen["idle"][0]))
    report = forecast.plan.report
    assert math.isclose(bubble, report.bubble, abs_tol=0.005)
    title = seen["timeline"][0]["text"]
    assert f"{report.bubble:.1%}" in title and timed(report.seconds) in title


def test_the_header_says_what_matters(seen, forecast):
    assert seen["title"][0]["text"] == f"char_gpt on {PARTITIONS} partitions"
    facts = " ".join(fact["text"] for fact in seen["facts"])
    worst = forecast.schedules[0].worst_bytes
    for fact in (
        "interleaved",
        f"{MICROBATCHES} microbatches",
        f"{forecast.schedules[0].bubble:.1%}",
        sized(worst),
        sized(forecast.bytes_per_step),
        "fits" if worst <= LIMIT else "does not fit",
    ):
        assert fact in facts, fact
    headings = [heading["text"] for heading in seen["headings"]]
    assert len(headings) == 6 and len(seen["borders"]) == PARTITIONS - 1
    assert all("stays on partition" in each["text"] for each in seen["reasons"][:2])
    assert len(seen["ranking"]) == len(NAMES)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_is_readable(page, tmp_path, dark):
    seen = measure(page, tmp_path, dark, **SELECTORS)
    texts = [*seen["names"], *seen["small"], *seen["lanes"], *seen["title"]]
    texts += [*seen["paragraphs"], *seen["reasons"]]
    for each in texts:
        assert contrast(each["color"], each["behind"]) >= 4.5, each["text"]
    is_dark = sum(seen["title"][0]["behind"][:3]) < 3 * 128
    assert is_dark == dark
    fills = {}
    for group, box in zip(seen["groups"], seen["actions"], strict=True):
        kind = next(k for k in ("forward", "backward") if k in group["classes"])
        fills.setdefault(kind, set()).add(tuple(box["fill"]))
    for kind, found in fills.items():
        assert len(found) == PARTITIONS  # each rank has its partition's colour
        for fill, text in itertools.product(found, seen[kind]):
            assert contrast(text["fill"], fill) > 4.5, (kind, fill)


def test_names_are_shown_as_they_are(tmp_path):
    seen = measure(hostile_names(), tmp_path, **SELECTORS, bold=".box b b, h1 b, li i")
    assert {name["text"] for name in seen["names"]} >= {'<b>&"1"', '<b>&"2"'}
    assert seen["bold"] == []


def test_a_skip_over_a_lane_goes_around_it(tmp_path):
    seen = measure(skipping(), tmp_path, **SELECTORS, lines=".crossing .line")
    assert len(seen["lanes"]) == 3
    middle = seen["lanes"][1]
    around = [line for line in seen["lines"] if line["top"] < middle["top"]]
    assert len(around) == 1
    assert around[0]["left"] < middle["left"] and middle["right"] < around[0]["right"]
