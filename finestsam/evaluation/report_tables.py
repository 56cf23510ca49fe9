"""The tables of the report: what became of objects and masks, and how each category does."""

from html import escape

from finestsam.data.coverage import SIZES
from finestsam.errors import printable
from finestsam.evaluation.class_scores import MEASURES, list_classes
from finestsam.evaluation.errors import MASK_KINDS, OBJECT_KINDS, Mistakes, sum_mistakes
from finestsam.evaluation.result import Evaluation
from finestsam.prediction.overlay import colour_classes

OBJECT_TITLES = {"found": "found", "merged": "merged with another", "split": "split", "missed": "missed"}
MASK_TITLES = {
    "finding": "finds an object",
    "duplicate": "duplicate of a better mask",
    "merging": "merges objects",
    "fragment": "fragment of an object",
    "in_crowd": "in a crowd region",
    "invented": "of nothing annotated",
}


def write_categories(evaluation: Evaluation) -> str:
    """Return a row for each category, in its colour in the images."""
    rows = list_classes(evaluation.ours.by_class)
    if not rows:
        return ""
    theirs = dict(list_classes(evaluation.baseline.by_class)) if evaluation.baseline else {}
    table = evaluation.ours.table
    colours = dict(zip(table.names, colour_classes(len(table.names)).tolist(), strict=True))
    lines = []
    for name, row in rows:
        swatch = f"<span style='color:#{bytes(colours[name]).hex()}'>&#9632;</span>"
        cells = [f"{swatch} {escape_text(name)}", str(row["objects"])]
        for measure in MEASURES:
            before = f" <span class='quiet'>({theirs[name][measure]:.3f})</span>" if name in theirs else ""
            cells.append(f"{row[measure]:.3f}{before}")
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    titles = ("category", "objects", "average precision", "at IoU 0.5", "recall, 100 masks an image")
    head = "".join(f"<th>{title}</th>" for title in titles)
    note = "in brackets the baseline; " if theirs else ""
    return (
        f"<h2>Categories</h2><table><tr>{head}</tr>{''.join(lines)}</table><p class='quiet'>A mask counts for its own "
        f"category alone; {note}categories without an object in these images are left out.</p>"
    )


def write_mistakes(evaluation: Evaluation) -> str:
    """Return what became of the objects and of the masks; the rows of each add up to their number."""
    if not evaluation.ours.mistakes:
        return ""
    ours = sum_mistakes(evaluation.ours.mistakes)
    has_other = evaluation.baseline is not None and evaluation.baseline.found is not None
    theirs = sum_mistakes(evaluation.baseline.mistakes) if has_other else None
    head = write_row(["", "all", *SIZES], "th")
    rows = _write_kinds("objects", OBJECT_TITLES, ours, theirs) + _write_kinds("masks", MASK_TITLES, ours, theirs)
    kinds = {OBJECT_TITLES[kind]: text for kind, text in OBJECT_KINDS.items()}
    kinds |= {MASK_TITLES[kind]: text for kind, text in MASK_KINDS.items()}
    explained = "".join(f"<li><b>{escape_text(title)}</b>: {escape_text(text)}</li>" for title, text in kinds.items())
    note = "In brackets the baseline. " if theirs else ""
    return (
        f"<h2>What the generator finds and misses</h2><table>{head}{rows}</table><p class='quiet'>{note}The rows of "
        "objects add up to the objects, those of masks to the masks; each by its own size, small: below 32 x 32 "
        "pixels, large: from 96 x 96 on. A mask of nothing annotated is wrong only where every object is annotated.</p>"
        f"<details><summary>what each row counts: the first of its group that holds</summary><ul>{explained}</ul>"
        "</details>"
    )


def _write_kinds(
    group: str, titles: dict[str, str], ours: dict[str, Mistakes], theirs: dict[str, Mistakes] | None
) -> str:
    """Return the row of the objects or of the masks, and below it one for each kind of them that there is."""

    def list_cells(kind: str | None) -> list[str]:
        cells = []
        for size in ("all", *SIZES):
            counts = [getattr(each[size], group) for each in (ours, theirs) if each]
            numbers = [sum(one.values()) if kind is None else one[kind] for one in counts]
            other = f" <span class='quiet'>({numbers[1]})</span>" if theirs else ""
            cells.append(f"<td>{numbers[0]}{other}</td>")
        return cells

    rows = [f"<tr class='total'><td>{group}</td>{''.join(list_cells(None))}</tr>"]
    for kind, title in titles.items():
        is_there = any(getattr(each["all"], group)[kind] for each in (ours, theirs) if each)
        if kind != "in_crowd" or is_there:
            rows.append(f"<tr><td class='kind'>{title}</td>{''.join(list_cells(kind))}</tr>")
    return "".join(rows)


def escape_text(value: str) -> str:
    """Return text that cannot be taken for HTML, and that every encoding can write."""
    return escape(printable(value), quote=True)


def write_row(cells: list[str], tag: str = "td") -> str:
    """Return a row of a table; the cells are text."""
    return "<tr>" + "".join(f"<{tag}>{escape_text(cell)}</{tag}>" for cell in cells) + "</tr>"
