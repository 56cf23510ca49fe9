"""What can go wrong that is not our bug."""

# What Python raises for a value of another type, size or form than the one expected.
VALUE_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


class UserError(Exception):
    """A setting, dataset, image or checkpoint that cannot be used.

    The text is one line that says what is wrong, with which value, in which file, and what would be right. The command
    prints it without a traceback and exits with 2.
    """


class Defect(Exception):
    """One image or annotation that cannot be used: skipped, counted and reported, never fatal by itself.

    Args:
        code: short name of the kind of defect, the same in every report: `truncated_image`, `empty_segmentation`.
        message: what is wrong, with the value, without the place, which the reader knows.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


def printable(text: object) -> str:
    """Return a file's name or a dataset's text for the screen, so that it cannot move the cursor or forge a line."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in str(text))


def name_count(count: int, noun: str) -> str:
    """Return `1 mask`, `2 masks`, ..."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
