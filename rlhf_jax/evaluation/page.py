"""A self-contained web page from Python: elements that escape their text, and one style sheet."""

import dataclasses
import html
from collections.abc import Iterable


class Html(str):
  """Text that is HTML already; any other text is escaped when it becomes part of an element."""


def h(tag: str, *children: str | Iterable, **attributes: str) -> Html:
  """An element: h("td", "1 < 2", class_="number") is <td class="number">1 &lt; 2</td>."""
  named = "".join(f' {k.rstrip("_")}="{html.escape(str(v))}"' for k, v in attributes.items())
  return Html(f"<{tag}{named}>{join(children)}</{tag}>")


def join(children: str | Iterable) -> Html:
  """Children, and lists of them, one after another; text that is not `Html` is escaped."""
  if isinstance(children, Html):
    return children
  if isinstance(children, str):
    return Html(html.escape(children))
  return Html("".join(map(join, children)))


def table(head: Iterable[str], rows: Iterable[Iterable[Html]], **attributes: str) -> Html:
  """A table that scrolls by itself where the page is narrow; rows hold their <th> and <td>."""
  head = h("thead", h("tr", [h("th", text, scope="col") for text in head]))
  body = h("tbody", [h("tr", cells) for cells in rows])
  return h("div", h("table", head, body, **attributes), class_="wide")


def page(title: str, *body: Html) -> str:
  """The whole document; it asks nothing of any other place and runs no script."""
  return (
    "<!doctype html>\n"
    '<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"{h('title', title)}<style>{CSS}</style></head>\n"
    f"<body>{h('main', body)}</body></html>\n"
  )


@dataclasses.dataclass(frozen=True)
class View:
  """A piece of a page as a notebook shows it: in a frame, which keeps the two styles apart."""

  body: str | Iterable
  height: int  # pixels; more scrolls

  def _repr_html_(self) -> str:
    frame = f"width: 100%; height: {self.height}px; border: 0"
    return h("iframe", srcdoc=page("", join(self.body)), style=frame)


# The colours --c0, --c1, ... of the light page are `curves.COLORS`.
CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --page: #f7f8fa; --ink: #1f2328;
  --soft: #5c6470; --faint: #c9ced6; --line: #e3e6eb; --good: 15, 138, 95;
  --c0: #6b7280; --c1: #2563eb; --c2: #c2570c; --c3: #0f8a5f; --c4: #8b3fd1; --c5: #be185d; }
@media (prefers-color-scheme: dark) { :root { --paper: #1b1f25; --page: #121519; --ink: #e4e7eb;
  --soft: #9aa3af; --faint: #464d57; --line: #2d333b; --good: 52, 190, 135;
  --c0: #9ca3af; --c1: #6ea8fe; --c2: #f0914a; --c3: #45c793; --c4: #c08bf5; --c5: #f27bb0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 4px; }
h3 { font-size: 15px; margin: 26px 0 2px; }
p { margin: 0 0 12px; max-width: 76ch; }
.soft, figcaption, .note { color: var(--soft); }
figcaption, .note { font-size: 13px; line-height: 1.4; }
pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.card, figure, .wide, pre { background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; }
.card { padding: 18px 20px; }
.notice { border-left: 4px solid var(--c2); margin: 14px 0; padding: 10px 16px; }
.two { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.two > * { margin: 0; }
.big { font-size: 44px; font-weight: 650; line-height: 1.1; letter-spacing: -0.02em; }
.big small { font-size: 18px; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.tracks { display: grid; grid-template-columns: max-content 1fr max-content; gap: 10px 12px;
  align-items: center; margin-top: 18px; font-variant-numeric: tabular-nums; }
.track { position: relative; height: 16px; border-radius: 4px; background: var(--line); }
.track i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; }
dl { display: grid; grid-template-columns: 1fr max-content; gap: 2px 12px; margin: 18px 0 0;
  border-top: 1px solid var(--line); padding-top: 12px; font-variant-numeric: tabular-nums; }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; }
.panels { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; padding: 12px 14px; }
figure b { display: block; font-size: 14px; }
figure svg { display: block; width: 100%; height: auto; margin: 4px 0 6px; }
figure svg text { font-family: inherit !important; }
.wide { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-weight: 400; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: 13px; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tr.main > *, .main { font-weight: 650; }
tr .sub { padding-left: 28px; color: var(--soft); }
td.shade { background: rgba(var(--good), calc(var(--v) * 0.5)); }
td.gap, th.gap { border-left: 1px solid var(--line); }
.error { color: var(--soft); font-size: 12.5px; font-weight: 400; }
.dialogue { margin: 0 0 14px; padding: 14px 16px; }
.dialogue .kind { color: var(--soft); font-size: 12.5px; margin-bottom: 6px; }
.says { white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0; display: grid;
  grid-template-columns: 74px 1fr; gap: 8px; }
.says > :first-child { color: var(--soft); font-size: 12.5px; padding-top: 2px; }
.answers { display: grid; gap: 10px; margin-top: 10px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 190px), 1fr)); }
.answer { border-left: 3px solid; padding: 2px 0 2px 10px; }
.answer .text { color: var(--ink); white-space: pre-wrap; overflow-wrap: anywhere; }
.answer .who { font-size: 12.5px; font-weight: 650; }
.answer .figures { font-size: 12.5px; color: var(--soft); font-variant-numeric: tabular-nums; }
.chain { display: flex; flex-wrap: wrap; align-items: stretch; gap: 6px; margin: 6px 0 0; }
.chain > .node { flex: 1 1 170px; border: 1px solid var(--line); border-top: 3px solid var(--c0);
  border-radius: 6px; background: var(--paper); padding: 8px 10px; font-size: 13px; }
.chain > .node b { display: block; }
.chain > .arrow { align-self: center; color: var(--soft); }
.bar { display: block; height: 12px; border-radius: 3px; background: var(--c1); min-width: 2px; }
td.fill { width: 55%; min-width: 120px; }
summary { cursor: pointer; margin: 8px 0; }
pre { padding: 14px; overflow: auto; max-height: 70vh; }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } th, td { padding: 6px 8px; }
  tbody th { white-space: normal; } td .error { display: block; }
  .says { grid-template-columns: 1fr; gap: 0; } .chain > .node { flex-basis: 100%; }
  .chain > .arrow { width: 100%; text-align: center; transform: rotate(90deg); line-height: 1; } }
"""
