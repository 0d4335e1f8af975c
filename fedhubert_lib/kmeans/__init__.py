"""The targets: codebooks fitted without showing a frame to anybody, and the labels that each client writes with them.

``stage`` is the notebook's one call; ``server`` asks the clients, ``client`` answers (handlers), ``reading`` has a
client's frames, ``clustering`` is k-means itself, ``public`` the speech that the server may see. ``hidden`` (a layer of
a checkpoint) and ``private`` (noise) are imported where a study asks for them. ``targets`` clusters a teacher's
features for 04_distill.
"""

from fedhubert_lib.kmeans import client
from fedhubert_lib.kmeans.server import KmeansError
from fedhubert_lib.kmeans.stage import run

__all__ = ["KmeansError", "client", "run"]
