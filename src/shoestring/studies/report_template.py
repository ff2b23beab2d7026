"""The report's page and its longer texts: all styles inside, nothing loaded from outside."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d1c1a; --muted: #6c6862; --line: #e4e0d8; --band: #f2eee6;
  --accent: #b4430f; --a: #2563a8; --b: #c2570c; --low: #7fb2e5; --high: #123a63;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161513; --card: #1f1e1b; --ink: #ece9e3; --muted: #a19c93; --line: #35322d; --band: #2b2924;
    --accent: #f08a4b; --a: #74aee8; --b: #f0a05a; --low: #35618f; --high: #b9dcff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 12px; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 52px 0 6px; }
p { max-width: 46em; margin: 8px 0; }
.lead { font-size: 1.12rem; }
.note, figcaption, .tile span { color: var(--muted); font-size: 0.9rem; }
.here { display: inline-block; font-size: 0.72rem; font-weight: 600; color: var(--accent); white-space: nowrap;
  border: 1px solid currentColor; border-radius: 99px; padding: 0 8px; line-height: 1.6; vertical-align: 1px; }
a { color: var(--accent); overflow-wrap: anywhere; }
code, pre { font: 0.86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; margin: 8px 0;
  overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin: 24px 0 8px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
.tile b { display: block; font-size: 1.35rem; font-weight: 650; letter-spacing: -0.01em; line-height: 1.3; white-space: nowrap; }
.tile span { display: block; line-height: 1.35; }
.samples { display: flex; flex-wrap: wrap; gap: 16px 24px; margin: 16px 0 8px; }
figure { margin: 0; }
.sample { width: var(--w); }
.sample img, .frame img { display: block; width: 100%; height: auto; border-radius: 6px; background: #fff;
  border: 1px solid var(--line); }
.pixels { image-rendering: pixelated; }
.sample figcaption { font-size: 0.82rem; line-height: 1.3; margin-top: 5px; overflow-wrap: anywhere; }
.unseen img { border: 2px dashed var(--accent); }
.unseen figcaption::after, .badge::after { content: "never seen"; display: block; color: var(--accent); font-weight: 600; }
.badge::after { display: inline; }
.film { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 230px), 1fr)); gap: 14px 16px; margin: 16px 0 8px; }
.frame { max-width: var(--w); }
.frame figcaption { margin-top: 4px; }
.film.rows { grid-template-columns: 1fr; gap: 8px; }
.film.rows .frame { display: grid; grid-template-columns: 7.5em minmax(0, var(--w)); align-items: center; gap: 12px; max-width: none; }
.film.rows figcaption { order: -1; text-align: right; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; margin: 14px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.card h3 { font-size: 1rem; margin: 0 0 2px; }
.axis-name { color: var(--muted); font-size: 0.8rem; margin: 6px 0 0; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.grid { stroke: var(--line); }
.band { fill: var(--band); }
.tick, .axis { fill: var(--muted); font-size: 12.5px; font-variant-numeric: tabular-nums; }
.mid { text-anchor: middle; } .end { text-anchor: end; }
polyline { fill: none; stroke-linejoin: round; stroke-width: 2; }
.faint { stroke-width: 1; opacity: 0.35; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 2px; padding: 0; font-size: 0.84rem; }
.legend span { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: 3px; }
.scroll { overflow-x: auto; margin: 14px 0 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: 0.9rem; padding-bottom: 6px; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; font-size: 0.85rem; color: var(--muted); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { min-width: 9em; }
.facts th, .facts td { text-align: left; } .facts td { white-space: normal; overflow-wrap: anywhere; } .facts td:first-child { color: var(--muted); min-width: 7em; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--line); color: var(--muted); font-size: 0.9rem; }
@media (max-width: 520px) {
  main { padding-top: 24px; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .samples { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px 10px; } .sample { width: auto; }
  .tick, .axis { font-size: 17px; }
  .film.rows .frame { grid-template-columns: 1fr; gap: 2px; } .film.rows figcaption { text-align: left; }
}
</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
<footer>$credit</footer>
</main>
</body>
</html>
""")

COMPARE_STYLE = """<style>
.runs { list-style: none; padding: 0; margin: 8px 0 0; } .runs li { margin: 3px 0; }
.run { white-space: nowrap; font-weight: 600; color: var(--ink); }
.run::before { content: ""; display: inline-block; width: 0.75em; height: 0.75em; border-radius: 3px; background: var(--c); margin-right: 0.4em; }
.warn { border-left: 3px solid var(--accent); padding-left: 12px; }
.axes > input { margin: 0 5px 0 14px; accent-color: var(--accent); } .axes > label { cursor: pointer; }
.axes .by { display: none; min-width: 0; }
#axis-images:checked ~ .charts .by-images, #axis-flops:checked ~ .charts .by-flops,
#axis-s:checked ~ .charts .by-s, #axis-usd:checked ~ .charts .by-usd { display: block; }
.gallery { width: auto; } .gallery th, .gallery td { border: 0; padding: 4px 6px 4px 0; vertical-align: middle; text-align: left; }
.gallery thead th { vertical-align: bottom; font-weight: 400; max-width: 100px; line-height: 1.25; overflow-wrap: anywhere; }
.gallery th span { font-weight: 400; } .gallery tbody th { min-width: 150px; max-width: 190px; padding-right: 14px; line-height: 1.35; }
.gallery td:first-child { min-width: 0; }
.gallery img { display: block; width: 96px; height: auto; border-radius: 6px; border: 1px solid var(--line); }
.settings td, .events td { white-space: normal; overflow-wrap: anywhere; min-width: 7em; text-align: left; }
.settings th, .events th { text-align: left; }
</style>
"""

LOSS = "While patches are masked, the training loss is that of the visible ones; validation always sees all."

STAGES = """Share of peak: FLOPs the model needs (recomputation not counted) over the best matrix product of this machine,
measured in the same run. Medians over the stage."""

FRECHET = """<b>At small N{at} the Fréchet distance is mostly bias</b>: training and held-out pictures are both real, and their
distance, the floor, is still far from 0. Read the value beside its floor, never beside another paper's.
It is computed on features of EfficientNet-Lite0, so it is not an FID."""

KID = "KID is unbiased: of two samples of one distribution it is 0 on average, and can be negative."

RETRIEVAL = """Retrieval: the share of {pictures} pictures{captions} whose nearest training picture (top-5: one of the five
nearest), by the cosine of the features, has their caption; in brackets the 95 % interval over captions. It asks whether
the model learnt what its captions look like, not whether it invents. The pictures are kept, each with its caption in
the PNG's metadata, so that anyone can compute it again."""

COPIES = """A near-copy differs from some training picture by less than 5 % of the range (root mean square over pixels). Some real
pictures are such twins without having been seen, as the count for held-out ones says."""

ORACLE = """The pictures are simple enough for a program to read them back; this is how often what it read agrees with the
caption."""

COMMANDS = """<h2>Now you</h2>
<p>A picture of your own words:</p>
<pre>{sample}</pre>
<p>A model of your own pictures: a folder of images, each with its caption in a <code>.txt</code> file beside it (or all of
them in one <code>metadata.jsonl</code>):</p>
<pre>{train}</pre>"""

PROVENANCE = """<h2>Where the figures come from</h2>
<div class="scroll"><table class="facts"><caption>{here} by this run, on this machine</caption>
<tbody>{rows}</tbody></table></div>
<details id="config"><summary>Configuration</summary><pre>{config}</pre></details>
{metrics}"""
