"""Reports of evaluations: one HTML file that opens from disk, made from run folders alone."""

from fewshot_seg.reports.gallery import check_gallery, chosen_episodes, draw_gallery
from fewshot_seg.reports.page import REPORT_NAME, write_report
from fewshot_seg.reports.run_folders import ReportedRun, read_run

__all__ = ["REPORT_NAME", "ReportedRun", "check_gallery", "chosen_episodes", "draw_gallery", "read_run", "write_report"]
