"""`edgetune devices`: list the profiles, show one, detect this machine. Parses, calls `edgetune.devices`, prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from edgetune import devices
from edgetune.errors import UsageError
from edgetune.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Device profiles: what a board or phone has, and this machine.")

_Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, nothing else there.")]


@app.command("list")
def list_command(json: _Json = False) -> None:
    """List all profiles: those that come with edgetune and your own."""
    profiles = devices.list_devices(warn=lambda message: typer.echo(f"warning: {message}", err=True))
    if json:
        _print_json(profiles)
        return
    from rich.table import Table

    table = Table("id", "RAM", "usable", "cores", "CPU", "runtime", "figures", box=None, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for profile in profiles:
        runtime = profile.runtime.torch or profile.runtime.ort
        row = [
            profile.id,
            format_bytes(profile.ram_bytes),
            format_bytes(profile.usable_ram_bytes),
            str(profile.cores or "-"),
            profile.cpu or "-",
            format_bytes(runtime.bytes) if runtime else "-",
            "seen" if profile.verified else "estimated",
        ]
        _add(table, row)
    _print(table)
    typer.echo(f"\nYour own profiles: {devices.user_dir()}", err=True)


@app.command("show")
def show_command(
    device: Annotated[str, typer.Argument(metavar="ID", help="An id, the path of a TOML file, or auto.")],
    json: _Json = False,
) -> None:
    """Show one profile with all its figures and where they come from."""
    profile = devices.find_device(device)
    if json:
        _print_json(profile)
        return
    _print(_profile_table(profile))
    if device != devices.AUTO:
        typer.echo(f"\nThe source of each figure stands beside it in {devices.find_path(device)}", err=True)


@app.command("detect")
def detect_command(
    save: Annotated[bool, typer.Option("--save", help="Keep it for --device auto.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write it to this new TOML file.")] = None,
    json: _Json = False,
) -> None:
    """Measure this machine: RAM and cores as this process may use them, GPU, speed, what torch costs."""
    if output is not None:
        if output.suffix != ".toml" or not output.stem:
            raise UsageError(f"--output is {str(output)!r}; it must end in .toml, as my-board.toml does.")
        try:
            there = output.exists()
        except OSError as error:
            raise UsageError(f"--output {output} can't be written: {error.strerror}. Name another file.") from error
        if there:
            raise UsageError(f"{output} exists and is not overwritten. Name a new file for --output.")
    typer.echo("measuring speed, and what importing torch costs ...", err=True)
    profile = devices.detect_device(measure_speed=True, measure_runtime=True)
    if save:
        devices.save_profile(profile, devices.saved_auto_path())
        typer.echo(f"saved for --device auto: {devices.saved_auto_path()}", err=True)
    if output is not None:
        devices.save_profile(msgspec.structs.replace(profile, id=output.stem), output)
        typer.echo(f"written: {output}", err=True)
    if json:
        _print_json(profile)
        return
    _print(_profile_table(profile))
    share, cap = devices.AUTO_CAP_SHARE, devices.default_cap_bytes(profile, is_host=True)
    typer.echo(f"\n--device auto caps a run at {share:.0%} of what is available: {format_bytes(cap)} now", err=True)


def _profile_table(profile: devices.DeviceProfile) -> Table:
    from rich.table import Table

    table = Table("field", "value", box=None, pad_edge=False, show_header=False)
    table.columns[0].no_wrap = True
    for field, value in _rows(msgspec.to_builtins(profile)):
        _add(table, [field, value])
    return table


def _rows(values: dict[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Field -> value as a person reads it; absent figures are shown as such, so that nobody looks for them."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        field = prefix + key
        if isinstance(value, dict):
            rows += _rows(value, f"{field}.")
        elif value is None:
            rows.append((field, "not known"))
        elif isinstance(value, bool):
            rows.append((field, "yes" if value else "no"))
        elif key.endswith("bytes_per_s") and isinstance(value, int | float):
            rows.append((field, f"{format_count(value)}B/s"))
        elif key.endswith("flops_per_s") and isinstance(value, int | float):
            rows.append((field, f"{format_count(value)}FLOP/s"))
        elif key.endswith("bytes") and isinstance(value, int):
            rows.append((field, f"{format_bytes(value)} ({value})"))
        else:
            rows.append((field, str(value)))
    return rows


def _add(table: Table, cells: list[str]) -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))  # Text: brackets in a file's name are not markup


def _print(table: Table) -> None:
    from rich.console import Console

    Console(highlight=False).print(table)


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
