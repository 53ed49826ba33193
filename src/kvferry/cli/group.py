"""How every verb ends: an error is one line on stderr and an exit code, a traceback only on request."""

from typing import Any

import typer
from typer.core import TyperGroup

from kvferry.errors import KvferryError


class Verbs(TyperGroup):
    """2 for a call that cannot be carried out as asked, 1 for a failure, 130 for Ctrl-C."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KvferryError as error:
            if ctx.params["debug"]:
                raise
            _end(str(error), error.exit_code)
        except (typer.Exit, typer.Abort):
            raise
        except (
            OSError,
            RuntimeError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            if ctx.params["debug"]:
                raise
            _end(
                f"unexpected {type(error).__name__}: {error}. Run kvferry --debug ... and report what it shows",
                1,
            )
        except KeyboardInterrupt:
            _end("stopped", 130)


def _end(message: str, exit_code: int) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(exit_code)
