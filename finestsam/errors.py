"""Errors that are not bugs of finestsam."""

# Python's errors for a value of the wrong type, size or form.
VALUE_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


class UserError(Exception):
    """A setting, dataset, image or checkpoint that cannot be used.

    The message is one line: what is wrong, with which value, in which file, and what would be right. The command prints
    it without a traceback and exits with code 2.
    """


class Defect(Exception):
    """One image or annotation that cannot be used. It is skipped, counted and reported; the work goes on.

    Args:
        code: short name of the kind of defect, the same in every report: `broken_image`, `empty_segmentation`.
        message: what is wrong, with the value. The caller adds the file and the annotation.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


def printable(text: object) -> str:
    """Return a text from a file with control characters escaped, so that it cannot move the cursor or fake a line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def name_count(count: int, noun: str) -> str:
    """Return `1 mask`, `2 masks`, ..."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
