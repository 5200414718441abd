"""What a plan's cells came to: rows beside the published values, how sure they are, tables, page and pictures."""

from longtail.report.page import write

__all__ = ["write"]
