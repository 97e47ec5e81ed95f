"""Numbers to pages: templates and plots live here and nowhere else. A page is one file that opens offline."""

from cifar.report.data import write_data_report
from cifar.report.evaluation import write_report
from cifar.report.history import read_history

__all__ = ["read_history", "write_data_report", "write_report"]
