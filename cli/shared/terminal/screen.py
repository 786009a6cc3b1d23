"""The one place where the command line writes to a terminal, a pipe or a log.

Most of what is printed comes from outside: names of files, layers, data sets, sentences of other libraries. It is shown
as it is: nothing in it is read as markup or as the name of an emoji, control characters are written out, and what the
stream's encoding has no byte for is replaced. A pipe that its reader has closed is not an accident: what was asked for
is on the disk before anything is printed.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

import click
from rich.console import Console
from rich.text import Text

from calib.errors import OutputError

__all__ = ["CLOSED_PIPE", "PIPE_WIDTH", "ClosedPipe", "Screen", "console", "echo", "forgiving_streams", "visible"]

PIPE_WIDTH = 160  # characters per line where there is no terminal to ask: tables stay whole in logs
CLOSED_PIPE = 128 + 13  # what a shell reports for a process ended by SIGPIPE
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class ClosedPipe(Exception):
    """The reader of stdout has gone (``| head``). No `OSError`: click would end the process for one."""


class Screen(Console):
    """A console that takes every string literally.

    Args:
        options: of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string from anywhere (a cell, a title, a sentence) as text of this screen."""
        return super().render_str(visible(text, self.file), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `rich.console.Console.print`.

        Raises:
            ClosedPipe: the reader of stdout has gone.
            OutputError: stdout cannot be written (a full disk).
        """
        with _output_errors():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """A closed stderr makes progress fall silent, a closed stdout ends the command.

        Raises:
            ClosedPipe: this is a screen of stdout.
        """
        self.quiet = True
        _to_nowhere(self.file)
        if not self.stderr:
            raise ClosedPipe


def console(*, stderr: bool = False) -> Screen:
    """A screen of the terminal's width, or of `PIPE_WIDTH` where there is no terminal."""
    screen = Screen(stderr=stderr)
    return screen if screen.is_terminal else Screen(stderr=stderr, width=PIPE_WIDTH)


def echo(text: str, *, err: bool = False, color: str | None = None, newline: bool = True) -> None:
    """Print one text without any layout.

    Raises:
        ClosedPipe: the reader of stdout has gone.
        OutputError: stdout cannot be written (a full disk).
    """
    stream = sys.stderr if err else sys.stdout
    shown = _encodable(text, stream) if color is None else click.style(visible(text, stream), fg=color)
    try:
        with _output_errors():
            click.echo(shown, err=err, nl=newline)
    except (ClosedPipe, OutputError):
        _to_nowhere(stream)
        if not err:  # a message that nobody can read is no reason to end
            raise


def visible(text: str, stream: Any = None) -> str:
    """``text`` with control characters written out, and with ``?`` for what ``stream`` cannot encode."""
    return _encodable(text.translate(_CONTROLS), stream)


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """While it lasts, stdout and stderr replace what they cannot encode, whoever writes; at the end they are flushed.

    Raises:
        ClosedPipe: the reader of stdout has gone.
        OutputError: stdout cannot be written (a full disk).
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="replace")
    try:
        yield
        with _output_errors():
            if sys.stdout is not None:
                sys.stdout.flush()
    except (ClosedPipe, OutputError):
        _flush_or_close()
        raise
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


@contextlib.contextmanager
def _output_errors() -> Iterator[None]:
    """Turn what goes wrong with writing to stdout into an `OutputError`, but for a closed pipe."""
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipe from error
    except OSError as error:
        raise OutputError(
            f"cannot write to standard output: {error.strerror}. What the command was to write to files is there."
        ) from error


def _flush_or_close() -> None:
    """What is left in the buffers must not fail once more when the interpreter ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            _to_nowhere(stream)


def _to_nowhere(stream: IO[str] | None) -> None:
    """Let the rest that is written to a stream vanish, also what the interpreter flushes at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        assert stream is not None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _encodable(text: str, stream: Any) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
