"""Figures: data in, a matplotlib Figure out.

Every function is pure: it makes its own Figure, without pyplot and its global state, so it works the same in a
notebook, in a script and on a headless node. Colours are those of Okabe and Ito, which colour-blind readers tell apart;
axes carry their units. ``save`` writes a figure as PNG and SVG; notebook.py shows it in a notebook.
"""

from fedhubert_lib.plots.speech import (
    aligned_units,
    clients,
    cluster_spectra,
    histograms,
    matrices,
    partition_schemes,
    phones_per_cluster,
    projection,
)
from fedhubert_lib.plots.style import heat_map, panels, png, save
from fedhubert_lib.plots.training import along, bars, comparison, curves, ledger

__all__ = [
    "aligned_units", "along", "bars", "clients", "cluster_spectra", "comparison", "curves", "heat_map", "histograms",
    "ledger", "matrices", "panels", "partition_schemes", "phones_per_cluster", "png", "projection", "save",
]  # fmt: skip
