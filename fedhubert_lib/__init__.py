"""Federated HuBERT pretraining and distillation: the library behind the notebooks."""

__version__ = "0.1.0"
