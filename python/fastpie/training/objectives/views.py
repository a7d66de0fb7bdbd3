"""`TwoViews`: a data set that gives two random views of each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from fastpie.errors import FastpieError

__all__ = ["TwoViews"]

_HANDED_THROUGH = ("sample_ids", "paths")


class TwoViews(Dataset[Any]):
    """Two views of each image, for contrastive training; everything else of an item is kept.

    Items `(image, ...)` become `((view1, view2), ...)`, dicts get the tuple in place of their entry
    "image", and a bare image gives `((view1, view2),)`. `sample_ids` and `paths` are the data set's.

    Example::

        views = TwoViews(dataset, transform)  # transform: random crop, flip, colour jitter, ...

    Attributes:
        dataset: the one given.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Any],
        second: Callable[[Any], Any] | None = None,
    ) -> None:
        """Join a data set and its augmentation.

        Args:
            dataset: map-style; items as `fastpie.mine` takes them.
            transform: from the image of an item to a view; called twice, at random.
            second: of the second view, where it is another one.

        Raises:
            FastpieError: if something is not callable, or the data set has no length.
        """
        for name, function in (("transform", transform), ("second", second)):
            if not callable(function) and not (name == "second" and function is None):
                raise FastpieError(
                    f"Expected `{name}` to be callable, but got {type(function).__name__}."
                )
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise FastpieError(
                f"Expected `dataset` to have items and a length, but got {type(dataset).__name__}."
            )
        self.dataset = dataset
        self._transforms = (transform, transform if second is None else second)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        if isinstance(item, dict):
            if "image" not in item:
                raise FastpieError(f"Expected an item with the key 'image', but got {list(item)}.")
            return {**item, "image": self._views(item["image"])}
        if isinstance(item, tuple | list):
            if not item:
                raise FastpieError("Expected an item with an image, but got an empty one.")
            return (self._views(item[0]), *item[1:])
        return (self._views(item),)

    def __getattr__(self, name: str) -> Any:
        # Only what the data set has: known_sample_ids asks by hasattr. Not before `dataset` is there
        # (a copy or an unpickled object that is being filled).
        if name in _HANDED_THROUGH and "dataset" in self.__dict__:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _views(self, image: Any) -> tuple[Any, Any]:
        first, second = self._transforms
        return first(image), second(image)
