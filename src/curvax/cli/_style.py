"""The look of the report: one style sheet, no external font, image or script."""

CSS = """
:root { --ink: #1f2937; --muted: #6b7280; --line: #e5e7eb; --soft: #f8fafc; --blue: #2b6cb0; --pale: #bcd3ea;
        --red: #d9480f; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.55; font-size: 16px;
       font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 56px 24px 72px; }
header p { color: var(--muted); margin: 6px 0 0; overflow-wrap: anywhere; }
.kicker { color: var(--blue); font-size: 13px; font-weight: 600; letter-spacing: .06em; text-transform: uppercase; }
h1 { font-size: 31px; font-weight: 600; letter-spacing: -.015em; line-height: 1.2; margin: 4px 0 0;
     overflow-wrap: anywhere; }
h2 { font-size: 20px; font-weight: 600; letter-spacing: -.01em; margin: 52px 0 12px; }
p { margin: 0 0 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px; margin: 32px 0 8px; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; background: var(--soft); }
.card b { display: block; font-size: 26px; font-weight: 600; letter-spacing: -.02em; line-height: 1.25;
          font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: 13.5px; line-height: 1.4; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--muted); font-size: 13px; padding: 8px 10px; vertical-align: bottom;
     border-bottom: 1px solid var(--ink); }
td { text-align: right; padding: 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 190px; }
td small { display: block; color: var(--muted); font-size: 12.5px; }
tr.tuned td { font-weight: 600; }
tr.reference td { color: var(--muted); }
td.bar { width: 24%; min-width: 130px; }
.track { display: block; position: relative; height: 8px; border-radius: 4px; background: var(--line); margin-top: 5px; }
.track i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--pale); }
tr.tuned .track i { background: var(--blue); }
tr.reference .track i { background: #d1d5db; }
.names td, .names th { text-align: left; overflow-wrap: anywhere; white-space: normal; }
.wrong { color: var(--red); font-weight: 600; }
figure { margin: 20px 0 8px; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption, .note { color: var(--muted); font-size: 14px; margin-top: 8px; }
.warning { border-left: 3px solid var(--red); padding: 2px 0 2px 14px; margin: 18px 0; font-size: 15px; }
ul { padding-left: 20px; margin: 0 0 12px; } li { margin: 5px 0; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: 13.5px; background: var(--soft);
       border: 1px solid var(--line); border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; }
footer { margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--muted); font-size: 13.5px; }
@media print { main { padding: 0; max-width: none; } figure, .card, tr { break-inside: avoid; } }
"""
