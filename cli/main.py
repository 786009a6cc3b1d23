"""``ptq``: the group of commands, and the one place where an error becomes a sentence and an exit code.

Commands are imported when they are called, so that ``ptq --help`` answers without loading torch.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, cast

import click

from calib.errors import OutputError, PtqError, unknown_name
from cli.shared.terminal.waiting import wait_asleep

__all__ = ["COMMANDS", "INTERRUPTED", "cli", "main"]

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


class Entry(NamedTuple):
    """One command: the module that exports it as ``command``, and its line in ``ptq --help``."""

    module: str
    summary: str


COMMANDS: dict[str, Entry] = {
    "quantize": Entry("cli.quantize", "Quantize a model and write a checkpoint that transformers loads."),
    "plan": Entry("cli.plan", "Choose a format for every linear within a budget of bytes."),
    "tune": Entry("cli.tune", "Tune the norms of a result end to end, at no byte more."),
    "export": Entry("cli.export", "Write a result in the format of another runtime."),
    "eval": Entry("cli.eval", "Measure perplexity, task accuracy and KL divergence of a model."),
    "compare": Entry("cli.compare", "Compare evaluations item by item, with significance tests."),
    "report": Entry("cli.report", "Write an HTML report about a quantized model and its evaluations."),
    "inspect": Entry("cli.inspect", "Show a quantized checkpoint layer by layer."),
    "generate": Entry("cli.generate", "Generate text with a model."),
    "serve": Entry("cli.serve", "Serve a model through an OpenAI-compatible endpoint."),
    "bench": Entry("cli.bench", "Measure how fast this machine runs packed weights."),
    "methods": Entry("cli.methods", "List the quantization methods and their options."),
}


class LazyGroup(click.Group):
    """A group whose commands are rows of `COMMANDS` until one of them is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return cast(click.Command, importlib.import_module(COMMANDS[cmd_name].module).command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown_name("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ptq-toolkit", prog_name="ptq", message="%(prog)s %(version)s")
def cli() -> None:
    """Post-training quantization for large language models.

    \b
    Examples:
      ptq quantize --method coreq --bits 3 MODEL -o OUT
      ptq eval OUT --text wikitext2
      ptq inspect OUT --sort loss
      ptq generate OUT "Once upon a time"

    MODEL is a local Hugging Face folder, a hub id or a .gguf file. Every command has --help, and all but serve --json.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; see `calib.errors` for the codes.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    from cli.shared.terminal.screen import CLOSED_PIPE, ClosedPipe, forgiving_streams

    wait_asleep()  # before a command imports torch
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with forgiving_streams():
            return _run(arguments)
    except ClosedPipe:
        return CLOSED_PIPE
    except OutputError as error:  # stdout cannot take the result, nor the error as JSON
        return _fail("OutputError", str(error), error.exit_code, [])


def _run(arguments: list[str]) -> int:
    """Call the command; what it raises on purpose becomes a sentence and an exit code."""
    try:
        code = cli.main(args=arguments, prog_name="ptq", standalone_mode=False)
    except PtqError as error:
        return _fail(type(error).__name__, str(error), error.exit_code, arguments)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _fail("UsageError", _with_hint(error), error.exit_code, arguments)
    except (click.Abort, KeyboardInterrupt):
        return _fail("Interrupted", _interrupted(arguments), INTERRUPTED, arguments)
    return code if isinstance(code, int) else 0


def _interrupted(arguments: Sequence[str]) -> str:
    """What Ctrl-C cost: of a quantization, the block under way."""
    if next((word for word in arguments if not word.startswith("-")), None) != "quantize":
        return "interrupted."
    return "interrupted. Finished blocks are kept: the same command goes on from there (--restart starts over)."


def _with_hint(error: click.ClickException) -> str:
    """The message of click, our name for what others call so, and where to read on."""
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "ptq"
    message = error.format_message()
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        answer = _our_name(error.option_name, error.ctx)
        message = message if answer is None else f"No such option: {error.option_name}. {answer}"
    return f"{message} See {path} --help."


def _our_name(option: str, context: click.Context) -> str | None:
    """What the command calls an option that it does not have under this name; ``None`` if nothing is known of it."""
    own = {name for parameter in context.command.params for name in parameter.opts}
    hyphens = option.replace("_", "-").lower()
    if hyphens in own:
        return f"ptq writes this {hyphens}."
    from ptq.recipe_files.other_names import other_name

    return other_name(context.info_name or "", option)


def _fail(kind: str, message: str, code: int, arguments: Sequence[str]) -> int:
    """Say what went wrong on one line, in JSON if the arguments ask for it, and return ``code``."""
    from cli.shared.terminal.screen import echo

    line = " ".join(message.split())
    if os.environ.get("RANK", "0") != "0":  # of several processes one speaks; this one's error may be its own
        echo(f"process {os.environ['RANK']}: error: {line}", color="red", err=True)
        return code
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--json" in options:
        echo(json.dumps({"error": {"kind": kind, "message": line}}))
    else:
        echo(f"error: {line}", color="red", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
