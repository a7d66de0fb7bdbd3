"""`image_quality`: exposure, contrast, blur, blank images and duplicates of a data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fastpie._extras import load_extra
from fastpie.analysis.duplicates import COEFFICIENTS, coefficients, first_alike
from fastpie.errors import FastpieError
from fastpie.mining.batching import reason_of
from fastpie.mining.places import places_of
from fastpie.mining.plan import Plan, ids_of, known_sample_ids, text_id
from fastpie.mining.reading import Reader, Sample
from fastpie.mining.result import MiningResult

__all__ = ["image_quality"]

_SIDE = 512  # pixels of the longer side that images are brought down to: classifiers see no more
_SIGMA = 1.0  # pixels, of the Gaussian before the Laplacian
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's "L"

# Iglewicz and Hoaglin, "How to detect and handle outliers" (1993): the modified z-score
# .6745 (x - median) / MAD, and 3.5 for an outlier. Here of logarithms, since exposure and sharpness
# change by factors.
_Z, _NORMAL = 3.5, 0.6745
# However alike the others are, what is flagged must be this fraction of the median, or less: a
# difference that can be seen. docs/design/analysis.md has the figures.
_DARK, _DIM, _BLURRED, _BLANK = 0.6, 0.4, 0.4, 0.25
_FLAT = (
    0.01  # contrast of a blank image at most: 2.5 of 255 grey levels, what a sensor's noise makes
)


# Of one image, its intensities as they came. A row of zeros is an image that could not be read.
_MEASURES = np.dtype(
    [
        ("read", "?"),
        ("dtype", "U8"),
        ("mean", "f8"),
        ("deviation", "f8"),
        ("low", "f8"),  # 1 % and 99 % quantiles
        ("high", "f8"),
        ("least", "f8"),
        ("most", "f8"),
        ("sharpness", "f8"),
        ("coefficients", "f2", (COEFFICIENTS,)),
    ]
)


def image_quality(
    data: Dataset[Any] | DataLoader[Any],
    result: MiningResult | None = None,
    *,
    num_workers: int | None = None,
    read_timeout: float | None = None,
    progress: bool | None = None,
) -> pa.Table:
    """Look at every image of a data set once: which are dark, bright, blurred, blank or there twice?

    Images are reduced to grey (luma of three channels, else the first channel; of a volume the middle
    slice) and to at most 512 pixels a side. Where a data set can be read before normalisation (as
    `ManifestDataset` can), that is what is measured.

    Intensities are scaled to [0, 1]: from [0, 255] for 8 bits; for other integers without a negative
    value from [0, 2^b - 1], b the bits that the data set uses; floats in [0, 1] stay; all others from
    the range between two robust percentiles of the data set (of the images' own 1 % and 99 % quantiles).

    - `brightness`: mean, in [0, 1].
    - `contrast`: standard deviation, in [0, 1].
    - `sharpness`: variance of the Laplacian (Pech-Pacheco et al., "Diatom autofocusing in brightfield
      microscopy", ICPR 2000), after a Gaussian of 1 pixel, divided by the variance of the image so that
      contrast does not count; null for a constant image. It depends on what is shown, and on the size
      of the image: compare images of one kind.
    - `dark`: brightness is an outlier to below and at most .6 of the median, or the brightest parts
      (99 % quantile) are and at most .4. `bright`: likewise what lacks to white, in brightness or in
      the darkest parts (1 %). `blurred`: sharpness, at most .4. An outlier has a logarithm whose
      modified z-score is under -3.5, among the images that are not blank.
    - `blank`: contrast of at most .01, and at most a quarter of the median contrast of the data set; or
      none at all. It is not called blurred nor a duplicate.
    - `duplicate_of`: the sample_id of the first image of a group of near-identical ones, in the order
      of the table; null for that first image and those without a group. See
      `fastpie.analysis.duplicates.first_alike`.

    Args:
        data: as for `fastpie.mine`; a DataLoader lends its data set and workers.
        result: a run, for the table of its samples; by default all samples of the data set.
        num_workers: processes that read; by default the DataLoader's, else none.
        read_timeout: seconds that a worker may take for one sample; see `fastpie.mine`.
        progress: whether to show a bar; by default where there is a terminal.

    Returns:
        A table with the column `sample_id` and those above: of a run one row a scored sample, in the
        order of `result.table`, else one row a sample, in sample_id order. A sample that is not there,
        cannot be read or holds NaN has nulls.

    Raises:
        FastpieError: for an iterable-style data set, ids that are not unique, a run of another data
            set, no image that can be measured, or if SciPy (`fastpie[analysis]`) is not installed.
    """
    load_extra("scipy.ndimage", "analysis", "the sharpness of images")  # or every image would fail
    reader = Reader(data, num_workers=num_workers, read_timeout=read_timeout)
    if result is not None:
        ids = result.table.column("sample_id")
        measures, named = _measured(reader, places_of(result, reader.dataset, ids), progress)
        expected = ids.to_pylist()
        for row, name in named.items():
            if name != expected[row]:
                measures[row] = 0
        return _table(ids.cast(pa.string()), measures)
    measures, named = _measured(reader, np.arange(len(reader.dataset)), progress)
    known = known_sample_ids(reader.dataset)
    names = ids_of(_names(measures, named) if known is None else known)
    plan = Plan.cut(names, 1)
    return _table(plan.sample_ids.array.cast(pa.string()), measures[plan.order])


def _measured(
    reader: Reader, places: np.ndarray, progress: bool | None
) -> tuple[np.ndarray, dict[int, str]]:
    """`_MEASURES` [N] of the samples at some places, and the ids that items tell, by row."""
    measures = np.zeros(len(places), _MEASURES)
    named: dict[int, str] = {}
    there = np.flatnonzero(places >= 0)
    hidden = None if progress is None else not progress
    bar = tqdm(total=len(there), desc="images", unit="img", disable=hidden, leave=False)
    first_reason = ""
    with bar:
        found = reader.map(_measure, places[there].tolist())
        for row, (result, reason) in zip(there, found, strict=True):
            if reason is None:
                sample_id, facts, reason = result
                if sample_id is not None:
                    named[int(row)] = sample_id
                if facts is not None:
                    measures[row] = facts
            first_reason = first_reason or reason or ""
            bar.update()
    if len(there) and not measures["read"].any():
        raise FastpieError(
            f"Expected images, but of {len(there)} samples none can be measured; the first: "
            f"{first_reason}"
        )
    return measures, named


def _names(measures: np.ndarray, named: dict[int, str]) -> list[str]:
    """As `mine` names samples that the data set does not."""
    unread = "#" if named else ""
    return [
        named.get(i, str(i) if read else f"{unread}{i}") for i, read in enumerate(measures["read"])
    ]


# ---------------------------------------------------------------------- one image


def _measure(sample: Sample) -> tuple[str | None, tuple[Any, ...] | None, str | None]:
    """The id in the item; what is kept of its image, as in `_MEASURES`; why nothing is."""
    sample_id = None if sample.sample_id is None else text_id(sample.sample_id)
    try:
        return sample_id, _facts(sample.image), None
    except (FastpieError, TypeError, ValueError) as error:  # arrays of objects, say
        return sample_id, None, reason_of(error)


def _facts(image: Any) -> tuple[Any, ...]:
    plane, dtype = _plane(image)
    least, most = float(plane.min()), float(plane.max())
    if not np.isfinite(least) or not np.isfinite(most):
        raise FastpieError("Expected an image of finite values, but it holds NaN or inf.")
    scale = _SIDE / max(plane.shape)
    if scale < 1:
        size = (max(1, round(plane.shape[1] * scale)), max(1, round(plane.shape[0] * scale)))
        plane = np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BOX))
    low, high = np.quantile(plane, (0.01, 0.99))
    mean, deviation = (float(f(plane, dtype=np.float64)) for f in (np.mean, np.std))
    if deviation <= 1e-5 * max(abs(least), abs(most)):  # rounding of fp32
        deviation = 0.0
    sharpness = _sharpness(plane, deviation)
    return (True, dtype, mean, deviation, low, high, least, most, sharpness, coefficients(plane))


def _plane(
    image: Any,
) -> tuple[np.ndarray, str]:  # fp32 [H, W] and the name of the type that it had
    if isinstance(image, Image.Image):
        array = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    else:
        leaves = [x for x in pytree.tree_leaves(image) if isinstance(x, Tensor | np.ndarray)]
        if not leaves:
            raise FastpieError(f"Expected an image, but got {type(image).__name__}.")
        first = leaves[0]
        if isinstance(first, Tensor):
            first = first.detach().cpu()
            first = (first.float() if first.is_floating_point() else first).numpy()
        array = first
    if array.ndim == 4:
        array = array[:, array.shape[1] // 2]
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise FastpieError(f"Expected an image [C, H, W], but got shape {list(array.shape)}.")
    with np.errstate(over="ignore"):  # becomes inf, which is refused
        values = (array if array.shape[0] == 3 else array[:1]).astype(np.float32)
    plane = np.tensordot(_LUMA, values, 1) if len(values) == 3 else values[0]
    return np.ascontiguousarray(plane), str(array.dtype)


def _sharpness(plane: np.ndarray, deviation: float) -> float:
    if deviation == 0:
        return float("nan")
    from scipy import ndimage  # an extra

    # Without the Gaussian the noise of single pixels hides any blur.
    edges = ndimage.gaussian_laplace(plane, _SIGMA)
    return float(edges.var(dtype=np.float64)) / deviation**2


# ---------------------------------------------------------------------- the data set


def _table(ids: Any, measures: np.ndarray) -> pa.Table:
    read = measures["read"]
    low, high = _ranges(measures)
    brightness, darkest, brightest = (
        ((measures[name] - low) / (high - low)).clip(0, 1) for name in ("mean", "low", "high")
    )
    contrast = (measures["deviation"] / (high - low)).clip(0, 1)
    sharpness = np.where(read, measures["sharpness"], np.nan)
    blank = _blank(contrast)
    others = read & ~blank
    first = first_alike(np.where(others[:, None], measures["coefficients"], np.float16(0)))
    dark = _outliers(brightness, others, _DARK) | _outliers(brightest, others, _DIM)
    bright = _outliers(1 - brightness, others, _DARK) | _outliers(1 - darkest, others, _DIM)
    copies = first != np.arange(len(first))
    return pa.table(
        {
            "sample_id": ids,
            "brightness": _numbers(brightness),
            "contrast": _numbers(contrast),
            "sharpness": _numbers(sharpness),
            "dark": pa.array(dark, mask=~read),
            "bright": pa.array(bright, mask=~read),
            "blurred": pa.array(_outliers(sharpness, others, _BLURRED) & others, mask=~read),
            "blank": pa.array(blank, mask=~read),
            "duplicate_of": ids.take(pa.array(first, mask=~copies)),
        }
    )


def _ranges(measures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fp64 [N] twice
    """What black and white are for each image: the same for all of one type. NaN where not read."""
    low, high = np.full((2, len(measures)), np.nan)
    for dtype in np.unique(measures["dtype"][measures["read"]]):
        same = measures["read"] & (measures["dtype"] == dtype)
        low[same], high[same] = _range(np.dtype(str(dtype)), measures[same])
    return low, high


def _range(dtype: np.dtype[Any], measures: np.ndarray) -> tuple[float, float]:
    if dtype == np.bool_:
        return 0.0, 1.0
    if np.issubdtype(dtype, np.integer) and measures["least"].min() >= 0:
        most = int(np.quantile(measures["most"], 0.99))  # one odd file decides nothing
        return 0.0, 2.0 ** max(8, most.bit_length()) - 1
    low = float(np.quantile(measures["low"], 0.05))
    high = float(np.quantile(measures["high"], 0.95))
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def _blank(contrast: np.ndarray) -> np.ndarray:  # bool [N]
    """NaN is not."""
    usual = np.median(contrast[contrast > 0]) if (contrast > 0).any() else 0.0
    blank: np.ndarray = (contrast == 0) | ((contrast <= _FLAT) & (contrast <= _BLANK * usual))
    return blank


def _outliers(
    values: np.ndarray,  # [N] of at least 0, or NaN
    among: np.ndarray,  # bool [N]
    fraction: float,
) -> np.ndarray:  # bool [N]
    """The values that are low among some of them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values)
        usual = logs[among & np.isfinite(logs)]
        if not len(usual):
            return np.zeros(len(values), dtype=bool)
        median = np.median(usual)
        deviation = np.median(np.abs(usual - median))
        # The product and not the quotient: with a deviation of 0 every lower value is an outlier.
        below = _NORMAL * (median - logs) > _Z * deviation
        low: np.ndarray = below & (logs <= median + np.log(fraction))
    return low


def _numbers(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
