"""The tables of the report: kinds of objects and masks, and the figures of each category."""

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
    """Return a table with a row for each category, marked with its colour in the images."""
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
    note = "The figures in brackets are the baseline's. " if theirs else ""
    return (
        f"<h2>Categories</h2><table><tr>{head}</tr>{''.join(lines)}</table><p class='quiet'>A mask only counts for its "
        f"own category. {note}Categories without objects in these images are left out.</p>"
    )


def write_mistakes(evaluation: Evaluation) -> str:
    """Return a table of the kinds of objects and of masks; the rows of each add up to their number."""
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
    note = "The numbers in brackets are the baseline's. " if theirs else ""
    return (
        f"<h2>What the generator finds and misses</h2><table>{head}{rows}</table><p class='quiet'>{note}Each object "
        "and each mask counts in one row, by its size. Small is below 32 x 32 pixels, large is 96 x 96 pixels or more. "
        "A mask of nothing annotated is wrong only if every object is annotated.</p>"
        "<details><summary>what each row counts (the first row that applies)</summary>"
        f"<ul>{explained}</ul></details>"
    )


def _write_kinds(
    group: str, titles: dict[str, str], ours: dict[str, Mistakes], theirs: dict[str, Mistakes] | None
) -> str:
    """Return the row of all objects or masks, and below it a row for each kind."""

    def list_cells(kind: str | None) -> list[str]:
        cells = []
        for size in ("all", *SIZES):
            by_model = [getattr(mistakes[size], group) for mistakes in (ours, theirs) if mistakes]
            numbers = [sum(counts.values()) if kind is None else counts[kind] for counts in by_model]
            baseline = f" <span class='quiet'>({numbers[1]})</span>" if theirs else ""
            cells.append(f"<td>{numbers[0]}{baseline}</td>")
        return cells

    rows = [f"<tr class='total'><td>{group}</td>{''.join(list_cells(None))}</tr>"]
    for kind, title in titles.items():
        has_any = any(getattr(mistakes["all"], group)[kind] for mistakes in (ours, theirs) if mistakes)
        if kind != "in_crowd" or has_any:
            rows.append(f"<tr><td class='kind'>{title}</td>{''.join(list_cells(kind))}</tr>")
    return "".join(rows)


def escape_text(value: str) -> str:
    """Return text escaped for HTML, with only printable characters."""
    return escape(printable(value), quote=True)


def write_row(cells: list[str], tag: str = "td") -> str:
    """Return a row of a table; the cells are text."""
    return "<tr>" + "".join(f"<{tag}>{escape_text(cell)}</{tag}>" for cell in cells) + "</tr>"
