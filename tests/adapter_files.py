"""Reads an adapter as if no base were loaded, so that no tensor counts as a copy of the base's own."""

from collections.abc import Mapping
from pathlib import Path

from loraplex.adapters.checkpoint import read_unidentified
from loraplex.adapters.weights import AdapterWeights, BaseLayers


def read_adapter(folder: Path, layers: BaseLayers | Mapping[str, tuple[int, int]]) -> AdapterWeights:
    """layers: a mapping stands for linear layers only: path -> (out_features, in_features)."""
    base = layers if isinstance(layers, BaseLayers) else BaseLayers(linear=layers)
    return read_unidentified(folder, base).identify(lambda name: None)
