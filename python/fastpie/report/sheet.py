"""The hardest samples as a small grid of pictures: what `MiningResult.show` gives a notebook."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch.utils.data import DataLoader

from fastpie.errors import FastpieError
from fastpie.mining.places import places_of
from fastpie.mining.plan import text_id
from fastpie.mining.reading import parse_item
from fastpie.mining.result import MiningResult
from fastpie.mining.scoring import level_column
from fastpie.report.thumbnails import picture_of

__all__ = ["Sheet", "sheet_of", "summary_html"]

_MOST_TEXT = 60  # characters of an id or a name under a picture
_MOST = 500  # pictures: a notebook keeps them all in its file
# Colours come from the notebook, light or dark: only the lines are drawn, half transparent.
_GRID = "display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:8px"
_CELL = "margin:0;padding:4px;border:1px solid #8886;border-radius:4px;overflow:hidden"
_PICTURE = "width:100%;height:120px;object-fit:contain;image-rendering:pixelated;background:#8882"
_TEXT = "font-size:11px;line-height:1.35;overflow-wrap:anywhere"


@dataclass(frozen=True)
class Card:
    """One sample: its facts as they are shown, and its picture as a data URI, or why there is none."""

    sample_id: str
    facts: list[tuple[str, str]]
    picture: str | None
    missing: str


@dataclass(frozen=True)
class Sheet:
    """Some samples, hardest first. A notebook shows pictures, `print` lines of text.

    Attributes:
        title: what they are.
        cards: of the samples.
    """

    title: str
    cards: list[Card]

    def _repr_html_(self) -> str:
        cells = "".join(map(_cell, self.cards))
        return f'<div><p>{escape(self.title)}</p><div style="{_GRID}">{cells}</div></div>'

    def __repr__(self) -> str:
        lines = [
            f"{_short(card.sample_id)}: "
            + ", ".join(f"{name} {value}" for name, value in card.facts)
            for card in self.cards
        ]
        return "\n".join([self.title, *lines])


def sheet_of(
    result: MiningResult,
    n: int = 24,
    by: str = "hardness",
    dataset: Any = None,
    class_names: Sequence[str] | None = None,
) -> Sheet:
    """The hardest samples of a run; see `MiningResult.show`."""
    if not 0 <= n <= _MOST:
        raise FastpieError(f"Expected `n` in [0, {_MOST}], but got {n}.")
    count = min(n, len(result))
    title = f"{count} of {len(result):,} samples, hardest first by {by}"
    if not count:
        return Sheet(title, [])
    dataset = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    # Half a sample more, since int(fraction * N) are selected.
    rows = result.select_rows(min(1.0, (count + 0.5) / len(result)), by)
    config = result.record["config"]
    highest = config["sparsities"][-1]
    at = (lambda score: level_column(score, highest)) if config["is_ladder"] else str
    named = {
        "label": "label",
        "dense": "prediction_dense",
        f"pruned {highest:g}": at("prediction_pruned"),
        by: by,
    }
    known = result.dataset.schema.names
    named = {name: column for name, column in named.items() if column in known}
    table = result.take(rows, list(dict.fromkeys(["sample_id", *named.values()])))
    names = class_names if class_names is not None else getattr(dataset, "class_names", None)
    pictures = _pictures(result, dataset, table["sample_id"])
    cards = []
    for record, (picture, missing) in zip(table.to_pylist(), pictures, strict=True):
        facts = [(name, _fact(column, record[column], names)) for name, column in named.items()]
        cards.append(Card(record["sample_id"], facts, picture, missing))
    return Sheet(title, cards)


def summary_html(result: MiningResult) -> str:
    """A run in a few lines."""
    config = result.record["config"]
    rows = {
        "run": result.location,
        "samples": f"{len(result):,}",
        "errors": f"{result.errors.num_rows:,}",
        "models": str(len(result.members) or 1),
        "task": config["task"],
        "sparsities": ", ".join(f"{s:g}" for s in config["sparsities"]),
        "hardness": str(result.record.get("hardness", "")),
    }
    cells = "".join(
        f"<tr><th style='text-align:left'>{name}</th><td style='text-align:left'>{escape(text)}</td></tr>"
        for name, text in rows.items()
    )
    return f"<table>{cells}</table><p>The hardest: <code>.show(dataset=...)</code></p>"


def _pictures(
    result: MiningResult, dataset: Any, sample_ids: Any
) -> list[tuple[str | None, str]]:  # data URI, or None and why
    if dataset is None:
        return [(None, "no data set given")] * len(sample_ids)
    places = places_of(result, dataset, sample_ids)
    return [
        _picture(dataset, int(place), sample_id)
        for place, sample_id in zip(places, sample_ids.to_pylist(), strict=True)
    ]


def _picture(dataset: Any, place: int, sample_id: str) -> tuple[str | None, str]:
    if place < 0:
        return None, "not in the data set"
    try:
        item = parse_item(dataset[place])
        if item.sample_id is not None and text_id(item.sample_id) != sample_id:
            raise FastpieError("the data set has another sample in this place")
        picture = picture_of(item.image)
        buffer = io.BytesIO()
        small = max(picture.size) <= 64  # JPEG smears the few pixels that there are
        picture.save(buffer, "png" if small else "jpeg")
    except Exception as error:  # a data set is anybody's code, and a bad file no reason to stop
        return None, f"cannot be shown: {str(error) or type(error).__name__}"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{'png' if small else 'jpeg'};base64,{data}", ""


def _fact(column: str, value: Any, class_names: Sequence[str] | None) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, list):  # the labels of a multilabel run
        return ", ".join(_class(i, class_names) for i, v in enumerate(value) if v == 1) or "none"
    if column == "label" or column.startswith("prediction_"):
        return _class(value, class_names)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _class(index: int, class_names: Sequence[str] | None) -> str:
    known = class_names is not None and 0 <= index < len(class_names)
    return str(class_names[index]) if known and class_names is not None else str(index)


def _cell(card: Card) -> str:
    facts = "".join(f"<div>{escape(n)} <b>{escape(_short(v))}</b></div>" for n, v in card.facts)
    name = escape(_short(card.sample_id))
    if card.picture is None:
        picture = f'<div style="{_PICTURE};{_TEXT}">{escape(_short(card.missing))}</div>'
    else:
        said = escape(_short(f"Sample {card.sample_id}"))
        picture = f'<img alt="{said}" src="{card.picture}" style="{_PICTURE}">'
    return (
        f'<figure style="{_CELL}" title="{escape(card.sample_id[:300])}">{picture}'
        f'<figcaption style="{_TEXT}">{name}{facts}</figcaption></figure>'
    )


def _short(text: str) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
