"""Printing never stops the work: when the terminal or the reading process is gone, output is dropped."""

import errno
import io
import os
import sys

STANDARD = (0, 1, 2)
UNREAD_ERRORS = {errno.EPIPE, errno.EIO}  # a pipe that is closed, as by `| head`; a terminal that is gone


class Screen(io.TextIOWrapper):
    """An output stream that drops text once its reader is gone."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._close_if_unread(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._close_if_unread(error)

    def _close_if_unread(self, error: OSError) -> None:
        if error.errno not in UNREAD_ERRORS:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def prepare_screen() -> None:
    """Let stdout and stderr take any text, even if they are closed at the start or close during the work."""
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:  # closed: the next opened file would get this number and receive the printed text
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _open_screen(sys.stdout, 1)
    sys.stderr = _open_screen(sys.stderr, 2)


def _open_screen(stream: io.TextIOWrapper | None, number: int) -> io.TextIOBase:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")
    try:
        if stream.fileno() != number:
            return stream  # replaced by other code, such as a test
        stream.flush()
        # A new buffer, because other code may still write to the old stream.
        buffer = io.BufferedWriter(io.FileIO(number, "wb", closefd=False))
        # Characters that the screen cannot show are printed as their code numbers.
        return Screen(buffer, stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering)
    except (OSError, ValueError, AttributeError):  # a notebook's stream has no file number
        return stream
