"""The command line: parse, call, print. Nothing here decides anything; nothing heavy is imported before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetune import __version__
from edgetune.cli import devices, export, finetune, plan, serve, use

EXIT_CODES = """Exit codes: 0 done; 1 what was named can't be used (data, weights, disk, profile file);
2 the command line isn't understood (flag, value, unknown device or model name); 3 does not fit under the cap;
4 the run passed its cap or stopped to avoid it; 129, 130 and 143 interrupted (a run that had begun can be resumed)."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    help="Fine-tune Vision Transformers on the device that will use them, under a memory cap that holds.",
)
app.command("finetune")(finetune.finetune)
app.command("plan")(plan.plan)
app.command("evaluate")(use.evaluate)
app.command("predict")(use.predict)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("import-params")(export.import_params)
app.add_typer(devices.app, name="devices")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgetune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
