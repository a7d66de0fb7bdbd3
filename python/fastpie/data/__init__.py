"""Images on disk as a data set: manifests, decoding and the cache of decoded images."""

from fastpie.data.cache import ImageCache
from fastpie.data.dataset import ManifestDataset
from fastpie.data.decode import Preprocessing, decode
from fastpie.data.manifest import Manifest, read_manifest
from fastpie.data.texts import Texts

__all__ = [
    "ImageCache",
    "Manifest",
    "ManifestDataset",
    "Preprocessing",
    "Texts",
    "decode",
    "read_manifest",
]
