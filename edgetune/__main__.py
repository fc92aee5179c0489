"""`edgetune` and `python -m edgetune`: run the command line, turn errors into one message and an exit code."""

from __future__ import annotations

import os
import sys


def entry() -> None:
    """What the shell runs: `main`, and an end that costs no memory.

    Python's own end would page in 100 MiB that no cap has seen: torch's teardown touches what a run never does.
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or _without_reader()
    if "torch" in sys.modules:
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """Raises: SystemExit with the documented code."""
    try:
        _main()
    except KeyboardInterrupt:  # at any moment, while something is imported too
        sys.stderr.write("edgetune: interrupted. A run folder that was begun can be gone on with: --resume RUN\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(_without_reader())


def _without_reader() -> int:
    """Whoever read our output has gone (`| head`): it must not be flushed again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _main() -> None:
    from edgetune.cli import app
    from edgetune.errors import EdgetuneError

    try:
        app(prog_name="edgetune")
    except EdgetuneError as error:
        sys.stderr.write(f"edgetune: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    entry()
