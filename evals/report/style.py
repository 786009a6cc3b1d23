"""The style sheet of a page: light and dark after the reader's settings, narrow screens, and paper."""

from __future__ import annotations

from evals.report.theme import DARK, LIGHT, css_variables

__all__ = ["STYLE"]

_RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--surface); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main, header, footer { max-width: 72rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--grid); }
p, ul { margin: .4rem 0 .8rem; max-width: 60rem; overflow-wrap: anywhere; }
li { margin: .2rem 0; }
.quiet, figcaption { color: var(--muted); font-size: .875em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { border: 1px solid var(--grid); border-radius: .5rem; padding: .6rem .8rem; }
.tile dt { color: var(--muted); font-size: .8rem; overflow-wrap: anywhere; }
.tile dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile dd small { display: block; color: var(--muted); font-size: .8rem; }
.pictures { columns: 26rem 2; column-gap: 1.5rem; }
figure { margin: 0 0 1.5rem; max-width: 36rem; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .25rem; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--series0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; min-width: min(100%, 30rem); }
.caption { font-size: .9em; font-weight: 600; margin: .75rem 0 .1rem; }
.not-significant { color: var(--muted); }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--grid); vertical-align: baseline; text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.w { text-align: left; white-space: normal; }
th:first-child { padding-left: 0; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; }
.better { color: var(--series2); }
.worse { color: var(--series1); }
tbody th { font-weight: 400; overflow-wrap: anywhere; min-width: 9rem; max-width: 22rem; }
td.w { min-width: 4rem; max-width: 22rem; overflow-wrap: break-word; }
td.w:last-child { min-width: 10rem; }
tbody tr:hover { background: var(--missing); }
details { border: 1px solid var(--grid); border-radius: .5rem; margin: .6rem 0; }
summary { cursor: pointer; padding: .5rem .8rem; font-weight: 600; overflow-wrap: anywhere; }
.folded { padding: 0 .8rem .4rem; }
dl { margin: .25rem 0 .75rem; }
.folded dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .15rem 1rem;
  font-size: .875rem; }
.folded dt { color: var(--muted); overflow-wrap: anywhere; }
.folded dd { margin: 0; overflow-wrap: anywhere; }
.warning { border-left: 3px solid var(--series1); padding-left: .75rem; }
footer { padding: 2rem 1rem; }
@media (max-width: 34rem) {
  .folded dl { grid-template-columns: 1fr; gap: 0; }
  .folded dd { margin-bottom: .4rem; }
  tbody th { min-width: 7rem; max-width: 11rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
}
"""
_PAPER = """
@page { margin: 14mm; }
@media print {
  body { font-size: 9.5pt; }
  main, header, footer { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  table { font-size: 6.5pt; width: 100%; min-width: 0; }
  th, td { padding: .12rem .25rem; }
  td.w, td.w:last-child { min-width: 0; }
  tbody th { min-width: 4.5rem; max-width: none; }
  thead { display: table-header-group; }
  tr, .tile { break-inside: avoid; }
  h2, .caption, summary { break-after: avoid; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .pictures { columns: 2; }
  details { border: 0; }
  details.short::details-content { content-visibility: visible; block-size: auto; }
  summary { padding: .5rem 0; list-style: none; }
  .folded { padding: 0; }
  .folded dl { font-size: 7pt; gap: 0 1rem; }
  a { color: inherit; text-decoration: none; }
}
"""
STYLE = (
    f":root {{ color-scheme: light dark; {css_variables(LIGHT)} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {css_variables(DARK)} }} }}\n"
    f"{_RULES.strip()}\n{_PAPER.strip()}\n"
)
