"""What a run reports: scores, `metrics.csv`, `report.json` and the summary on the terminal. No torch."""

from edgetune.report.metrics import MetricsLog
from edgetune.report.run_report import RunReport, read_report, report_schema, report_to_json
from edgetune.report.scores import Scores, Tally, classification_scores, is_better
from edgetune.report.summary import print_summary, verdict_line

__all__ = [
    "MetricsLog",
    "RunReport",
    "Scores",
    "Tally",
    "classification_scores",
    "is_better",
    "print_summary",
    "read_report",
    "report_schema",
    "report_to_json",
    "verdict_line",
]
