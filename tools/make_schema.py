"""Write `docs/report.schema.json`, the JSON schema of a run's `report.json`, from `edgetune.report.RunReport`.

python tools/make_schema.py [--output docs/report.schema.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from edgetune.report import report_schema

DEFAULT = Path(__file__).resolve().parent.parent / "docs" / "report.schema.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT)
    output: Path = parser.parse_args(arguments).output
    output.write_text(json.dumps(report_schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
