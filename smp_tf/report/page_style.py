"""How the plan page looks, in light and in dark."""

from collections.abc import Iterator

# OKLCH: partitions differ in hue only, so text on all of them is read as easily.
# Hues that are told apart side by side, then more of them at the golden angle.
_HUES = (255, 55, 155, 350, 300, 200, 95, 25)

_SHEET = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --ink: #1c1d1f; --soft: #5d6269; --rule: #e3e4e6;
  --line: #a9aeb5; --warn: #8a4b00; --warn-bg: #fff3df; --bad: #b3261e;
  --lane: .98 .012; --fill: .945 .032; --edge: .7 .1; --strong: .47 .13;
  --light: .84 .075; --on-light: #16181b; --on-strong: #fff;
  --weights: #35507a; --gradients: #6f93c4; --optimizer: #b4c7e2;
  --activations: #e2a04a; --allocator: #eec999; --update: #8c7aa9; }
@media (prefers-color-scheme: dark) { :root {
  --page: #16181b; --card: #1e2125; --ink: #e9eaec; --soft: #a2a8b0; --rule: #33373d;
  --line: #6b727b; --warn: #ffc271; --warn-bg: #3a2b12; --bad: #ff8a80;
  --lane: .24 .022; --fill: .31 .045; --edge: .5 .08; --strong: .79 .11;
  --light: .45 .085; --on-light: #fff; --on-strong: #101214;
  --weights: #9db9e6; --gradients: #6a8cc0; --optimizer: #435a80;
  --activations: #d9923a; --allocator: #8f6a3d; --update: #a796c4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 28px 60px; max-width: 1540px; color: var(--ink);
  background: var(--page); font: 15px/1.5 system-ui, "Segoe UI", Roboto, Cantarell,
  "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 40px 0 2px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 118ch; }
section > p { font-size: 13.5px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 20px 0 0; }
.facts > div { background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: 9px 16px 10px; min-width: 118px; }
.facts span { display: block; font-size: 12px; color: var(--soft); }
.facts b { font-size: 19px; font-weight: 600; line-height: 1.25; }
.facts small { display: block; font-size: 12px; color: var(--soft); }
.facts .bad b, .over { color: var(--bad); }
.warning { background: var(--warn-bg); color: var(--warn); border-radius: 8px;
  padding: 10px 16px; margin: 14px 0 0; max-width: none; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; padding: 16px; }
.canvas { position: relative; margin: 0 auto; }
.canvas > svg { position: absolute; left: 0; top: 0; overflow: visible; }
.lane { position: absolute; border-radius: 10px; padding: 8px 12px;
  background: oklch(var(--lane) var(--hue)); white-space: nowrap;
  overflow: hidden; }
.lane b { display: block; font-size: 14.5px; line-height: 1.3;
  color: oklch(var(--strong) var(--hue)); }
.lane span { display: block; font-size: 12px; line-height: 15px; color: var(--soft); }
.box { position: absolute; padding: 3px 9px 0; border-radius: 6px; overflow: hidden;
  font-size: 12px; line-height: 15px; white-space: nowrap;
  background: oklch(var(--fill) var(--hue));
  border: 1px solid oklch(var(--edge) var(--hue)); }
.box bdi { display: block; overflow: hidden; text-overflow: ellipsis; }
.box small { display: flex; justify-content: space-between; gap: 4px; font-size: 10.5px;
  line-height: 14px; color: var(--soft); }
.box small span { overflow: hidden; text-overflow: ellipsis; min-width: 0; }
.box small b { font-weight: 400; flex: none; }
.bar { position: absolute; left: 0; right: 0; bottom: 0; height: 4px; }
.bar i { display: block; height: 4px;
  background: oklch(var(--strong) var(--hue)); }
.line { fill: none; stroke: var(--line); }
.near { fill: none; stroke: transparent; stroke-width: 11; pointer-events: stroke; }
.head { fill: var(--line); }
.crossing .line { stroke: oklch(var(--strong) var(--hue)); }
.crossing .head, .crossing text { fill: oklch(var(--strong) var(--hue)); }
.return .line { stroke-dasharray: 7 4; }
.crossing text { font-size: 11.5px; font-weight: 600; }
.link:hover .line, .crossing:hover .line { stroke: var(--ink); }
.link:hover .head, .crossing:hover .head { fill: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; font-size: 13px;
  color: var(--soft); margin: 0 0 12px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin-right: 7px; vertical-align: -1px; }
.legend i.limit { width: 3px; height: 15px; background: var(--bad);
  vertical-align: -3px; }
.legend i.idle { background: var(--rule); }
.weights { background: var(--weights); } .gradients { background: var(--gradients); }
.optimizer { background: var(--optimizer); }
.activations { background: var(--activations); }
.allocator { background: var(--allocator); } .update { background: var(--update); }
.memory .row { display: grid; grid-template-columns: 62px 1fr 96px;
  column-gap: 14px; align-items: center; margin-bottom: 10px; }
.stack { position: relative; display: flex; height: 22px; background: var(--rule);
  border-radius: 4px; }
.stack i { display: block; height: 22px; flex: none; }
.stack i:first-child { border-radius: 4px 0 0 4px; }
.stack u { position: absolute; top: -4px; bottom: -4px; width: 3px; margin-left: -1px;
  background: var(--bad); border-radius: 2px; }
.row small { grid-column: 2; font-size: 12.5px; color: var(--soft); }
.row small.over { grid-column: 3; color: var(--bad); }
.rank, .row .rank { font-weight: 600; color: oklch(var(--strong) var(--hue));
  fill: oklch(var(--strong) var(--hue)); font-size: 14px; }
.timeline svg { display: block; }
.timeline text { font-size: 11.5px; }
.timeline text.rank { font-size: 14px; }
.idle { fill: var(--rule); opacity: .75; }
.action rect { stroke: var(--card); stroke-width: .8; }
.action text { text-anchor: middle; pointer-events: none; }
.forward rect { fill: oklch(var(--light) var(--hue)); }
.forward text { fill: var(--on-light); }
.backward rect { fill: oklch(var(--strong) var(--hue)); }
.backward text { fill: var(--on-strong); }
i.forward { background: oklch(var(--light) var(--hue)); }
i.backward { background: oklch(var(--strong) var(--hue)); }
.tick { stroke: var(--line); stroke-dasharray: 1 4; }
.timeline .time { fill: var(--soft); text-anchor: middle; }
.borders { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); }
.border { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 18px 8px; overflow-wrap: anywhere; }
.border h3 { font-size: 14.5px; margin: 0 0 6px; }
.border h3 b { color: oklch(var(--strong) var(--hue)); font-weight: 600; }
.border h3 span { font-weight: 400; color: var(--soft); }
.border ul { margin: 0; padding-left: 18px; font-size: 13.5px; }
.border li { margin-bottom: 5px; color: var(--soft); }
.border li b { color: var(--ink); font-weight: 500; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 12.5px; }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--rule);
  vertical-align: baseline; }
tr:last-child td { border-bottom: 0; }
td.figure, th.figure { text-align: right; white-space: nowrap; }
td.path { overflow-wrap: anywhere; }
tr.best td { font-weight: 600; }
footer { margin-top: 36px; font-size: 12.5px; color: var(--soft); }
"""


def style_sheet(num_partitions: int) -> str:
    """CSS; partition p's colours follow from the hue of class ``p<p>``."""
    rules = [
        f".p{p} {{ --hue: {hue}; }}" for p, hue in enumerate(_hues(num_partitions))
    ]
    return _SHEET + "\n".join(rules) + "\n"


def _hues(count: int) -> Iterator[int]:
    for p in range(count):
        yield _HUES[p] if p < len(_HUES) else round(77 + 137.5 * p) % 360
