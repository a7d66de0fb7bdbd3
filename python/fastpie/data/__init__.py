"""Images on disk as a data set: manifests and decoding."""

from fastpie.data.decode import Preprocessing, decode
from fastpie.data.manifest import ManifestDataset

__all__ = ["ManifestDataset", "Preprocessing", "decode"]
