"""A page in a headless browser: what is where, and how it looks.

The page is opened with a script of ours at its end, that writes down what it finds.
Chromium prints the document as it is then. So no driver is needed, and no package.
"""

import json
import re
import shutil
import subprocess

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next(filter(None, map(shutil.which, _NAMES)), None)

needs_chromium = pytest.mark.skipif(
    PROGRAM is None,
    reason="no headless browser; on Debian: apt install chromium",
)

# Large enough for all of a page: only what is in the window can be hit.
_WINDOW = (2600, 7000)

_OPTIONS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --disable-dev-shm-usage --enable-logging=stderr
    --virtual-time-budget=2000""".split()

_SCRIPT = """
<script>
const context = new OffscreenCanvas(1, 1).getContext(
  "2d", {willReadFrequently: true});
const known = {};
const rgb = text => {  // as it is drawn: [red, green, blue, alpha]
  if (!(text in known)) {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    known[text] = [...context.getImageData(0, 0, 1, 1).data];
  }
  return known[text];
};
const colour = (e, key) => rgb(getComputedStyle(e)[key]);
const behind = e => {  // the colour that a person sees behind an element
  for (; e; e = e.parentElement)
    if (colour(e, "backgroundColor")[3]) return colour(e, "backgroundColor");
  return rgb("white");
};
const look = e => {
  const at = e.getBoundingClientRect();
  const top = document.elementFromPoint((at.left + at.right) / 2,
                                        (at.top + at.bottom) / 2);
  return {
    left: at.left, top: at.top, right: at.right, bottom: at.bottom,
    data: {...e.dataset}, classes: [...e.classList], title: e.title,
    text: e.textContent, background: colour(e, "backgroundColor"),
    behind: behind(e), color: colour(e, "color"), fill: colour(e, "fill"),
    on_top: !!top && (e == top || e.contains(top)),
    is_cut: e.scrollWidth > e.clientWidth,
  };
};
addEventListener("load", () => {
  const found = {};
  for (const [name, selector] of Object.entries(WANTED))
    found[name] = [...document.querySelectorAll(selector)].map(look);
  found.resources = performance.getEntriesByType("resource").map(e => e.name);
  const note = document.createElement("script");
  note.type = "application/json";
  note.id = "measured";
  note.textContent = JSON.stringify(found).replaceAll("<", "\\\\u003c");
  document.body.append(note);
});
</script>
"""


def measure(page, folder, dark=False, **selectors):
    """Open a page.

    Args:
        page: HTML.
        folder: a new one, for the browser's own files.
        selectors: name -> CSS selector.

    Returns:
        name -> what each element that it selects is like; ``resources``, that the page
        has loaded; ``console``, what was printed there.
    """
    file = folder / "page.html"
    script = _SCRIPT.replace("WANTED", json.dumps(selectors))
    file.write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    result = subprocess.run(
        [
            PROGRAM,
            *_OPTIONS,
            *scheme,
            f"--user-data-dir={folder / 'profile'}",
            "--window-size={},{}".format(*_WINDOW),
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    found = re.search(r'id="measured">(.*?)</script>', result.stdout, re.DOTALL)
    assert found, f"the page did not load: {result.stderr[-2000:]}"
    measured = json.loads(found[1])
    measured["console"] = [
        line for line in result.stderr.splitlines() if "CONSOLE" in line
    ]
    return measured


def width(element):
    return element["right"] - element["left"]


def overlap(one, other, allowed=0.5):
    """Whether two elements share more than an edge."""
    return (
        one["left"] < other["right"] - allowed
        and other["left"] < one["right"] - allowed
        and one["top"] < other["bottom"] - allowed
        and other["top"] < one["bottom"] - allowed
    )


def contrast(one, other):
    """Of two colours [red, green, blue], 1 to 21; WCAG 2.1, 1.4.3, asks for 4.5."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour):
    red, green, blue = (
        part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in colour[:3]
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
