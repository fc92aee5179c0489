"""Write the JSON schemas in `docs/` from the code: of a run's `report.json` and of artifacts' `manifest.json`.

python tools/make_schema.py [--output docs]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgetune.artifacts.manifest import manifest_schema
from edgetune.report import report_schema

DEFAULT = Path(__file__).resolve().parent.parent / "docs"
SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {
    "report.schema.json": report_schema,
    "artifacts.schema.json": manifest_schema,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT, help="folder")
    output: Path = parser.parse_args(arguments).output
    for name, schema in SCHEMAS.items():
        (output / name).write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
