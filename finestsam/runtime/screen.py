"""What is printed reaches whoever looks, or nobody: work of hours does not end because a window was closed."""

import errno
import io
import os
import sys

STANDARD = (0, 1, 2)
NOBODY_LOOKS = {errno.EPIPE, errno.EIO}  # `| head` has read enough; a terminal that is gone


class Screen(io.TextIOWrapper):
    """An output that swallows everything once nobody reads it any more."""

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
        if error.errno not in NOBODY_LOOKS:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def prepare_screen() -> None:
    """Let stdout and stderr of this process take any text, be closed from the first on, or be closed meanwhile."""
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _open_screen(sys.stdout, 1)
    sys.stderr = _open_screen(sys.stderr, 2)


def _open_screen(stream: io.TextIOWrapper | None, number: int) -> io.TextIOBase:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")
    try:
        if stream.fileno() != number:
            return stream  # somebody else looks after it
        stream.flush()
        # Not its own buffer: whoever has the stream already goes on writing to it.
        buffer = io.BufferedWriter(io.FileIO(number, "wb", closefd=False))
        # A name in letters that the screen does not have is shown by their numbers.
        return Screen(buffer, stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering)
    except (OSError, ValueError, AttributeError):  # of a notebook, which has no number
        return stream
