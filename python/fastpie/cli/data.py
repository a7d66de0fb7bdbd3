"""The data set that the command line's options describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpie.data import ManifestDataset

__all__ = ["NOTE", "open_data"]

NOTE = "fastpie.cli"
"""In run.json's `note`: how the command line opened the data (`data`) and the model (`model`)."""


def open_data(source: dict[str, Any]) -> ManifestDataset:
    """Open it.

    Args:
        source: what JSON can hold: `source` (the manifest), `split`, `manifest` (options of
            `read_manifest`), `preprocessing` (fields of `Preprocessing`), `cache` and `cache_limit`
            (bytes).
    """
    from fastpie.data import ImageCache, ManifestDataset, Preprocessing, read_manifest

    manifest = read_manifest(source["source"], **source["manifest"])
    if source["split"]:
        manifest = manifest.subset(source["split"])
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in source["preprocessing"].items()
    }
    cache = source["cache"] and ImageCache(source["cache"], limit=source["cache_limit"])
    return ManifestDataset(manifest, preprocessing=Preprocessing(**options), cache=cache or None)
