"""Numbers of things, as a reader sees them."""


def name_count(count: int, noun: str) -> str:
    """Return `1 mask`, `2 masks`, ..."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
