"""Reports as people read them: tables, plots, one Markdown and one HTML page that needs no other file.

Knows the layout of report.json and nothing about how its numbers were made; never loads torch. Evaluation and
the `report` verb share it.
"""

from sememe.figures.changes import changes_plot
from sememe.figures.comparison import write_comparison, write_rows
from sememe.figures.concepts import write_concepts
from sememe.figures.data import (
    HEADLINE,
    REPORT,
    Report,
    open_report,
    read_curves,
    read_draws,
    read_watched,
    stopped,
    write_draws,
)
from sememe.figures.erasure import write_erasure
from sememe.figures.explanations import lift_table, write_explanations
from sememe.figures.geometry import write_geometry
from sememe.figures.grid import grid_plots
from sememe.figures.pages import write_pages
from sememe.figures.patching import write_patching
from sememe.figures.results import claims_table, results_tables, write_results
from sememe.figures.scrubbing import write_scrubbing
from sememe.figures.steering import write_steering
from sememe.figures.tables import BETTER, GROUPED, csv_of, headline_table, markdown_table
from sememe.figures.toys import layers_plot, superposition_plot
from sememe.figures.traces import agreement_plot, circuit_plot

__all__ = [
    "BETTER",
    "GROUPED",
    "HEADLINE",
    "REPORT",
    "Report",
    "agreement_plot",
    "changes_plot",
    "circuit_plot",
    "claims_table",
    "csv_of",
    "grid_plots",
    "headline_table",
    "layers_plot",
    "lift_table",
    "markdown_table",
    "open_report",
    "read_curves",
    "read_draws",
    "read_watched",
    "results_tables",
    "stopped",
    "superposition_plot",
    "write_comparison",
    "write_concepts",
    "write_draws",
    "write_erasure",
    "write_explanations",
    "write_geometry",
    "write_pages",
    "write_patching",
    "write_results",
    "write_rows",
    "write_scrubbing",
    "write_steering",
]
