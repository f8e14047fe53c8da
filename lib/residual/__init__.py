"""ResiDual: residual units of vision transformers, their spectra, and their alignment with text."""

from residual.data import dataset_names, load_dataset, task_names
from residual.encoders import Encoder, load_encoder
from residual.extraction import extract
from residual.sources import encoder_names
from residual.store import load_units
from residual.towers import UnsupportedArchitectureError
from residual.units import trace

__all__ = [
    "Encoder",
    "UnsupportedArchitectureError",
    "dataset_names",
    "encoder_names",
    "extract",
    "load_dataset",
    "load_encoder",
    "load_units",
    "task_names",
    "trace",
]
