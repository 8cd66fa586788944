"""The entry point: find the command, run it, and turn whatever happens into an exit code."""

import errno
import importlib
import os
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core
import typer.main

import nvfp4check
from nvfp4check.cli.command import Ending, Group
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.interrupts import interruptible
from nvfp4check.cli.streams import stdout_that_refuses, write_stderr, write_stdout
from nvfp4check.cli.table import COMMANDS, Entry
from nvfp4check.findings import CheckError
from nvfp4check.report.visible import visible

PROGRAM = "nvfp4check"

#: What the machine refuses, whatever the program does. A file that is not there is none of these:
#: whoever opens it says so better.
_REFUSALS = frozenset(
    (
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC,
        errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
    )
)  # fmt: skip


class LazyCommand(typer.core.TyperCommand):
    """A command known by its line of help alone, until it is called.

    Its context is the real command's context, so parsing, help and completion are the real ones.
    """

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.help)
        self._module = entry.module

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Import the command's module and hand over to the command in it."""
        app: typer.Typer = importlib.import_module(self._module).app
        real = typer.main.get_command(app)
        real.name = self.name
        return real.make_context(*args, **kwargs)


def make_root() -> typer.core.TyperGroup:
    """Return the root command, with a lazy command for each line of the table."""
    app = typer.Typer(
        cls=Group,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=(
            "\b\n"
            "Exit codes:\n"
            "  0  checked, and it holds\n"
            "  1  checked, and it does not: findings, differences, a failed property\n"
            "  2  could not be checked: bad usage, unreadable input, missing dependency\n"
            "  3  undecided: too little data to tell\n"
            "\n\b\n"
            "Examples:\n"
            "  nvfp4check validate ./model\n"
            "  nvfp4check rules NV602\n"
        ),
    )

    @app.callback(no_args_is_help=True)
    def nvfp4check_(
        version: Annotated[
            bool,
            typer.Option("--version", help="Show the version and exit.", callback=_show_version),
        ] = False,
    ) -> None:
        """Is this FP4 model computed, stored and served as it should be?"""

    root = typer.main.get_command(app)
    if not isinstance(root, typer.core.TyperGroup):
        raise TypeError(f"typer made a {type(root).__name__} of an app with a callback")
    for name, entry in COMMANDS.items():
        root.add_command(LazyCommand(name, entry))
    return root


def _show_version(asked: bool) -> None:
    if asked:
        write_stdout(f"{PROGRAM} {nvfp4check.__version__}\n")
        raise typer.Exit(ExitCode.HOLDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Arguments default to the process's own. Every exception ends here: what a user can act on
    becomes one message, and what is a bug of this program becomes a traceback with the exit code
    of "could not be checked", because "checked, and it does not hold" would be a lie.
    """
    try:
        with interruptible():
            make_root().main(args=None if argv is None else list(argv), prog_name=PROGRAM)
    except Ending as ending:
        return ending.code
    except SystemExit as ending:  # help, version, completion, bad usage, Ctrl-C
        if ending.code in (None, ExitCode.HOLDS):
            return ExitCode.HOLDS
        if ending.code == ExitCode.INTERRUPTED:
            return _interrupted()
    except CheckError as error:
        _complain(str(error))
    except KeyboardInterrupt:
        return _interrupted()
    except BaseException as error:  # the boundary of the program; a panic in Rust is no Exception
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            where = os.fsdecode(error.filename) if error.filename else stdout_that_refuses()
            _complain(f"{where}: {error.strerror}" if where else str(error.strerror))
        else:
            write_stderr(
                f"{traceback.format_exc()}"
                "nvfp4check: internal error: this is a bug in nvfp4check and says nothing about "
                "the input. Please report it with the lines above and the command line.\n"
            )
    return ExitCode.COULD_NOT_CHECK


def _complain(message: str) -> None:
    # Line by line: a message may have several, and a name in it may come from a checkpoint.
    lines = "\n".join(visible(line) for line in message.split("\n"))
    write_stderr(f"nvfp4check: error: {lines}\n")


def _interrupted() -> int:
    write_stderr("\nnvfp4check: interrupted\n")
    return ExitCode.INTERRUPTED
