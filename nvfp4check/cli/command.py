"""How a command's module is written.

A module makes an `app` and puts its function, or its several functions, in it:

    app = make_app()

    @command(app, examples=("nvfp4check validate ./model",))
    def validate(checkpoint: CheckpointArgument, ...) -> int:
        ...
        return ExitCode.HOLDS

A function returns its exit code and raises `CheckError` for what cannot be checked; its docstring
is the help. Heavy imports (torch, the checkpoint package) stand inside the function, so that
`--help` and completion stay quick. An app with several commands says
`make_app(group="what they are for")`.
"""

import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn, ParamSpec

import typer
import typer.core

from nvfp4check.cli.streams import write_stdout

P = ParamSpec("P")


class Ending(Exception):  # noqa: N818  it is no error
    """A command has ended with this exit code.

    It is not typer's own `Exit`, so that an exit code 1 is always a command's own word and never
    that of the library around it.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Help:
    """Help that is a result as any other: a stdout that does not take it is an error."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option, which writes as commands do and not as the library does."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.callback = _show_help
        return option


def _show_help(ctx: Any, option: Any, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        write_stdout(f"{ctx.get_help()}\n")
        ctx.exit()


class Group(_Help, typer.core.TyperGroup):
    """A group of commands."""


class _Command(_Help, typer.core.TyperCommand):
    """A command whose help says nothing in the words of Python's types."""

    def get_help(self, ctx: Any) -> str:
        """Return the help; after an argument that may be repeated stands no `<list[str]>`."""
        return re.sub(r" <list\[\w+\]>", "...", super().get_help(ctx))


def make_app(group: str | None = None) -> typer.Typer:
    """Return a Typer app with the defaults of this command line.

    With `group`, the app holds subcommands even when there is only one; `group` is its help, which
    ends with the first example of each.
    """
    app = typer.Typer(
        cls=Group,
        rich_markup_mode=None,  # plain help: quick, narrow, and the same in a log
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    if group is not None:

        @app.callback(help=group, no_args_is_help=True)
        def hold_subcommands() -> None:
            pass

    return app


def command(
    app: typer.Typer, *, examples: Sequence[str], name: str | None = None
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Put the function below into the app; what it returns becomes the exit code.

    `examples` are whole command lines; they end the help.
    """

    def put(function: Callable[P, int]) -> Callable[P, int]:
        @wraps(function)
        def end(*args: P.args, **kwargs: P.kwargs) -> NoReturn:
            raise Ending(int(function(*args, **kwargs)))

        # In the list of a group it is the first sentence, whole: the library would cut it short.
        summary = " ".join((function.__doc__ or "").partition("\n\n")[0].split())
        app.command(name, cls=_Command, short_help=summary, epilog=_epilog(examples))(end)
        group = app.registered_callback
        if group is not None:
            group.epilog = "\n".join((group.epilog or _epilog(()), _line(examples[0])))
        return function

    return put


def _epilog(examples: Sequence[str]) -> str:
    return "\n".join(["\b", "Examples:", *map(_line, examples)])


def _line(example: str) -> str:
    return f"  {example}"
