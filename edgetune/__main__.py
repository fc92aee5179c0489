"""`edgetune` and `python -m edgetune`: run the command line, turn errors into one message and an exit code."""

from __future__ import annotations

import os
import sys


def main() -> None:
    from edgetune.cli import app
    from edgetune.errors import EdgetuneError

    try:
        app(prog_name="edgetune")
    except EdgetuneError as error:
        sys.stderr.write(f"edgetune: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("edgetune: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); standard output must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
