"""The report: one self-contained HTML page of what a run was, cost and achieved, made from its
journal and config alone."""

from stillhouse.report.page import write_report

__all__ = ["write_report"]
