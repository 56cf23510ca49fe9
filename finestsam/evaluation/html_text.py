"""Text and rows of tables for the report, safe against whatever a name holds."""

from html import escape

from finestsam.errors import printable


def escape_text(value: str) -> str:
    """Return text that cannot be taken for HTML, and that every encoding can write."""
    return escape(printable(value), quote=True)


def write_row(cells: list[str], tag: str = "td") -> str:
    """Return a row of a table; the cells are text."""
    return "<tr>" + "".join(f"<{tag}>{escape_text(cell)}</{tag}>" for cell in cells) + "</tr>"
