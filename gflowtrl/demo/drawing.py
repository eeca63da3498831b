"""Recommendations and the way through the tree as HTML. All texts are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from gflowtrl.catalog import Item

from .answers import Answer, Child, Level
from .history import label


CSS = """
.demo h4 { margin: 1.2em 0 .3em; font-weight: 600; }
.demo h4:first-child { margin-top: 0; }
.demo code, .demo td.token { font-family: var(--font-mono); }
.demo code { font-size: inherit; background: none; border: none; padding: 0; }
.demo .scroll { overflow-x: auto; }
.demo table { border-collapse: collapse; width: 100%; margin: 0; border: none !important; }
.demo th { text-align: left; font-weight: 500; white-space: nowrap; }
.demo th, .demo td { padding: .25em .9em .25em .4em !important; border: none !important; }
.demo th, .demo td, .demo p { color: var(--body-text-color); }
.demo tr { border: none; border-bottom: 1px solid var(--border-color-primary) !important; }
.demo td { white-space: nowrap; }
.demo td.text { white-space: normal; width: 100%; min-width: 9em; }
.demo .number { text-align: right; font-variant-numeric: tabular-nums; }
.demo tr.taken td { background: var(--background-fill-secondary); font-weight: 600; }
.demo .bar { display: inline-block; width: 110px; vertical-align: middle; }
.demo .bar i { display: block; height: 6px; min-width: 1px; border-radius: 2px; background: var(--color-accent); }
.demo .bar i.target { margin-top: 2px; background: var(--body-text-color); opacity: .35; }
"""


def percent(share: float) -> str:
    """Return a probability in percent with about three digits, "<0.001%" for very small ones."""
    if 0 < share < 1e-5:
        return "<0.001%"
    return f"{100 * share:.{0 if share >= 0.9995 else 1 if share >= 0.1 else 2 if share >= 0.01 else 3}f}%"


def draw_answer(answer: Answer) -> str:
    """Return recommendations as an HTML table, with columns for teacher and target where they are known."""
    with_target = any(row.target is not None for row in answer.rows)
    with_teacher = any(row.teacher_probability is not None for row in answer.rows)
    heads = {"": "number", "item": "text", " ": "bars", "policy": "number"}
    heads |= {"target": "number"} if with_target else {}
    heads |= {"teacher": "number", "teacher's rank": "number"} if with_teacher else {}
    rows = []
    for row in answer.rows:
        cells = [
            f"{row.rank}.",
            label(row.item, row.title),
            _bars(row.probability, row.target),
            percent(row.probability),
        ]
        cells += [percent(row.target)] if row.target is not None else []
        if with_teacher:
            known = row.teacher_probability is not None
            cells += [percent(row.teacher_probability), f"{row.teacher_rank:,}"] if known else ["", ""]
        rows.append((cells, False))
    notes = "".join(f"<p>{escape(note)}</p>" for note in answer.notes)
    return f'<div class="demo">{notes}{_table(heads, rows)}</div>'


def draw_way(levels: Sequence[Level], titles: Mapping[Item, str]) -> str:
    """Return the levels as HTML: for each prefix a table of its tokens with bars, the taken one marked.

    Args:
        levels: from `way_to`.
        titles: titles of the example items.
    """
    return f'<div class="demo">{"".join(_draw_level(level, titles) for level in levels)}</div>'


def _draw_level(level: Level, titles: Mapping[Item, str]) -> str:
    with_target = level.children[0].target is not None
    heads = {"token": "token", " ": "bars", "policy": "number", **({"target": "number"} if with_target else {})}
    heads |= {"rank": "number", "items": "number", "for example": "text"}
    rows = [(_cells(child, titles), child.taken) for child in level.children]
    place = f"After <code>{escape(' '.join(level.prefix))}</code>" if level.prefix else "First token"
    shown, last = len(level.children), level.children[-1]
    number = "1 choice" if level.choices == 1 else f"{level.choices:,} choices"
    if last.rank > shown:  # it is not among the best, but it is taken
        number += f", the best {shown - 1} and the one that is taken"
    elif shown < level.choices:
        number += f", the best {shown}"
    return f"<h4>{place}: {number}</h4>{_table(heads, rows)}"


def _cells(child: Child, titles: Mapping[Item, str]) -> list[str]:
    target = [] if child.target is None else [percent(child.target)]
    example = label(child.example, titles.get(child.example))
    numbers = [percent(child.probability), *target, f"{child.rank:,}", f"{child.items:,}"]
    return [child.token, _bars(child.probability, child.target), *numbers, example]


def _bars(policy: float, target: float | None) -> str:
    """Return HTML of a bar for the policy's probability, and one for the target below it."""
    second = "" if target is None else f'<i class="target" style="width:{100 * target:.2f}%"></i>'
    return f'<span class="bar"><i style="width:{100 * policy:.2f}%"></i>{second}</span>'


def _table(heads: Mapping[str, str], rows: Iterable[tuple[Sequence[str], bool]]) -> str:
    """Return a table.

    Args:
        heads: the name of each column, and its kind: "number", "text", "token" or "bars", whose cells are HTML.
        rows: the cells of each row, and whether it is marked.
    """
    lines = ["".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in heads.items())]
    marks = [""]
    for cells, marked in rows:
        pairs = [
            (kind, cell if kind == "bars" else escape(cell)) for kind, cell in zip(heads.values(), cells, strict=True)
        ]
        lines.append("".join(f'<td class="{kind}">{text}</td>' for kind, text in pairs))
        marks.append(' class="taken"' if marked else "")
    body = "".join(f"<tr{mark}>{line}</tr>" for mark, line in zip(marks, lines, strict=True))
    return f'<div class="scroll"><table>{body}</table></div>'
