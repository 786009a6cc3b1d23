"""Options that were given and have no effect are named: what a user asked for and does not get is not passed over."""

from __future__ import annotations

from collections.abc import Mapping

import click
from click.core import ParameterSource

__all__ = ["given_options", "idle_sentences"]


def given_options(context: click.Context) -> dict[str, str]:
    """The flag of every option on the command line, by the name of its parameter."""
    return {
        str(parameter.name): "/".join([max(parameter.opts, key=len), *parameter.secondary_opts])
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    }


def idle_sentences(given: Mapping[str, str], reasons: Mapping[str, str]) -> list[str]:
    """A sentence for every option that was given and has a reason to have no effect.

    Args:
        given: flags by parameter (`given_options`).
        reasons: by parameter, why it has no effect in this call.
    """
    return [f"{flag} has no effect: {reasons[name]}" for name, flag in given.items() if name in reasons]
