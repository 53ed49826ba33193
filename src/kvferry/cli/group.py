"""How every verb ends: an error is one line on stderr and an exit code, a traceback only on request."""

from typing import Any

import typer
from typer.core import TyperGroup

from kvferry.errors import KvferryError

_BUGS = (OSError, RuntimeError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_NOT_OURS = (typer.Exit, typer.Abort, BrokenPipeError)
_MISUSE: Any = typer.BadParameter.__base__  # a call that cannot be read; the class has no public name


class Verbs(TyperGroup):
    """2 for a call that cannot be carried out as asked, 1 for a failure, 130 for Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:  # Typer's copy of click's Context has no public name
        try:
            return super().invoke(ctx)
        except _NOT_OURS:
            raise
        except _MISUSE as error:
            said = error.format_message()
            if len(said.splitlines()) != 1:  # a group without a verb: its help
                raise
            _end(f"error: {said.rstrip('.')}. See {error.ctx.command_path} --help", error.exit_code)
        except (KvferryError, *_BUGS) as error:
            if ctx.params["debug"]:
                raise
            _end(*_explain(error))
        except KeyboardInterrupt:
            _end("stopped", 130)


def _explain(error: Exception) -> tuple[str, int]:
    """What to say, and the exit code."""
    if isinstance(error, KvferryError):
        return f"error: {error}", error.exit_code
    cure = "Run kvferry --debug ... and report what it shows"
    return f"error: unexpected {type(error).__name__}: {error}. {cure}", KvferryError.exit_code


def _end(message: str, exit_code: int) -> None:
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(exit_code)
