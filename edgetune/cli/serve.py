"""`edgetune serve`: a page that was exported, in the browser of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `edgetune export --web` wrote.", show_default=False)
    ],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
) -> None:
    """Serve a page that trains in the browser, to this machine alone; Ctrl-C ends it."""
    from edgetune.artifacts.reading import read_manifest
    from edgetune.web.folder import has_runtime, npm_line
    from edgetune.web.server import HOST, server

    served = server(folder, port)
    manifest = read_manifest(folder)
    if not has_runtime(folder):
        typer.echo(
            f"the page lacks its runtime. Get it with:\n  {npm_line(manifest.runtime)}\n"
            f"  edgetune export --web {folder} --ort-web ort-web",
            err=True,
        )
    typer.echo(f"http://{HOST}:{served.server_address[1]}/  (Ctrl-C ends it)")
    with served:
        try:
            served.serve_forever()
        except KeyboardInterrupt:
            typer.echo("ended", err=True)
