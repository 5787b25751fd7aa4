"""How the report of a comparison looks, in a light and in a dark theme."""

CSS = """
:root {
  --paper: #fbfaf7; --card: #fff; --ink: #1d2530; --soft: #67717e; --line: #e3e0d8; --band: #e4572e14;
  --empty: #e8e6e0; --lane: #f3f1ec; --hot: #fdeee8;
}
@media (prefers-color-scheme:dark) {
  :root {
    --paper: #14181e; --card: #1b2129; --ink: #e8e6e1; --soft: #9aa4b0; --line: #2c343f; --band: #e4572e24;
    --empty: #2a313b; --lane: #232a33; --hot: #3a2620;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; letter-spacing: -.02em; margin: 0 0 6px; }
h2 { font-size: 20px; margin: 0 0 4px; }
p { margin: 4px 0 14px; color: var(--soft); max-width: 76ch; }
ul { color: var(--soft); padding-left: 18px; margin: 8px 0 26px; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px; margin: 22px 0;
  overflow-x: auto;
}
svg { display: block; width: 100%; height: auto; font: 12px system-ui,sans-serif; }
svg text:not([fill]) { fill: var(--ink); }
.tick { fill: var(--soft)!important; font-size: 11px; }
.axis { fill: var(--soft)!important; font-size: 12px; }
.grid { stroke: var(--line); }
.small { font-size: 10px; }
.leader { stroke: var(--line); fill: none; }
.band { fill: var(--band); }
.lane { fill: var(--lane); }
.mass { fill: var(--ink); opacity: .75; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
table { font-size: 13px; }
th,td { padding: 5px 6px; text-align: right; white-space: nowrap; }
th:first-child,td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; font-size: 12.5px; border-bottom: 1px solid var(--line); }
tbody tr+tr td { border-top: 1px solid var(--line); }
tr.kind td { padding-top: 18px; color: var(--soft); text-align: left; white-space: normal; }
tr.kind b { color: var(--ink); }
tr.ours td { background: var(--hot); font-weight: 600; }
td.text { white-space: normal; text-align: left; }
.wide { overflow-x: auto; }
ul.verdict {
  color: var(--ink); background: var(--card); font-size: 16px; list-style: none; padding: 14px 20px;
  border-left: 4px solid #e4572e;
}
ul.verdict li { margin: 3px 0; }
.legend span { margin-right: 18px; white-space: nowrap; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
.pm { color: var(--soft); font-weight: 400; font-size: 12px; }
"""
