"""Numbers to pages: templates and plots live here and nowhere else. A page is one file that opens offline."""

from cifar.report.compare import write_comparison_report
from cifar.report.data import write_data_report
from cifar.report.evaluation import write_report
from cifar.report.history import read_history
from cifar.report.sweep import write_sweep_report

__all__ = ["read_history", "write_comparison_report", "write_data_report", "write_report", "write_sweep_report"]
