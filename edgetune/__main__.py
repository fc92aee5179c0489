"""`edgetune` and `python -m edgetune`: run the command line, turn errors into one message and an exit code."""

from __future__ import annotations

import os
import sys


def main() -> None:
    try:
        _main()
    except KeyboardInterrupt:  # at any moment, while something is imported too
        sys.stderr.write("edgetune: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); standard output must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _main() -> None:
    from edgetune.cli import app
    from edgetune.errors import EdgetuneError

    try:
        app(prog_name="edgetune")
    except EdgetuneError as error:
        sys.stderr.write(f"edgetune: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
