"""Federated HuBERT pretraining and distillation: the library behind the notebooks."""

import os

from fedhubert_lib import threads

__version__ = "0.1.0"

# Nothing is reported to anybody, looked up or installed behind the user's back. Flower and Ray read these on import.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

threads.configure()
