"""The targets: codebooks fitted without showing a frame to anybody, and the labels that each client writes with them.

``clustering`` is k-means itself; ``reading`` a client's frames; ``client`` what clients do (handlers); ``server`` what
the server does; ``stage`` the notebook's one call.
"""

from fedhubert_lib.kmeans import client
from fedhubert_lib.kmeans.server import KmeansError
from fedhubert_lib.kmeans.stage import run

__all__ = ["KmeansError", "client", "run"]
