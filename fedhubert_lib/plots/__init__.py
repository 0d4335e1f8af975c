"""Pictures: data in, a matplotlib Figure out.

Every function is pure: it makes a Figure of its own, without pyplot and its global state, so it works the same in a
notebook, in a script and on a headless node. Colours are those of Okabe and Ito, told apart by colour-blind readers;
axes carry their units. ``save`` writes a figure as PNG and SVG; notebook.py shows it in a notebook.
"""

from fedhubert_lib.plots.results import along, bars, confusion, kept, layers
from fedhubert_lib.plots.speech import clients, partition_schemes, phone_lengths, speakers, utterance_lengths
from fedhubert_lib.plots.style import png, save
from fedhubert_lib.plots.training import curves, ledger
from fedhubert_lib.plots.units import (
    aligned_units,
    cluster_sizes,
    cluster_spectra,
    histograms,
    inertia,
    matrices,
    phones_per_cluster,
    projection,
)

__all__ = [
    "aligned_units",
    "along",
    "bars",
    "clients",
    "cluster_sizes",
    "cluster_spectra",
    "confusion",
    "curves",
    "histograms",
    "inertia",
    "kept",
    "layers",
    "ledger",
    "matrices",
    "partition_schemes",
    "phone_lengths",
    "phones_per_cluster",
    "png",
    "projection",
    "save",
    "speakers",
    "utterance_lengths",
]
