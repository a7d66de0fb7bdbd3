"""`analyze`: every analysis that a run has data for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.analysis.analysis import Analysis
from fastpie.analysis.classes import class_impact, class_ratios, count_ratios
from fastpie.analysis.cleanlab_agreement import cleanlab_agreement
from fastpie.analysis.doubt import label_in_doubt
from fastpie.analysis.forgettability import class_changes, curves, first_significant, levels, links
from fastpie.analysis.hardness import hardness_interval, hardness_values
from fastpie.analysis.metrics import OVERALL, measure
from fastpie.analysis.neighbours import (
    atypical,
    label_conflict,
    nearest_neighbours,
    run_features,
    standardised,
)
from fastpie.analysis.pairs import pair_links, pairs, regression
from fastpie.analysis.predictions import Predictions
from fastpie.analysis.quadrants import quadrants
from fastpie.analysis.quality import image_quality
from fastpie.analysis.sentences import sentences
from fastpie.analysis.stability import control_share, stability, stability_of_scores
from fastpie.analysis.subgroups import subgroups
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.scores.pie import exemplars

__all__ = ["DEFAULT_DEFINITIONS", "analyze", "analyze_predictions"]

DEFAULT_DEFINITIONS = {"multilabel": "spearman", "multiclass": "modal"}
"""The published ones: PruneCXR, Hooker et al."""

_PRUNECXR_SPARSITY = 0.9
# Those of benchmarks/quality. In its pilot 3 and 10 found fewer rare kinds than 30 (they come in groups, in
# which few neighbours look near), and 10 fewer hard samples with right labels than 20.
_NEIGHBOURS = 30
_CONFLICT_NEIGHBOURS = 20


def analyze(
    run: MiningResult | str | os.PathLike[str],
    *,
    dataset: Any = None,
    class_names: Sequence[str] | None = None,
    train_counts: Any = None,
    sparsity: float | None = None,
    fraction: float = 0.05,
    definition: str | None = None,
    metric: str = "ap",
    compat: str | None = None,
    control: MiningResult | str | os.PathLike[str] | None = None,
    records: pa.Table | None = None,
    out_of_sample: Any = None,
    attributes: Sequence[str] | None = None,
    intersections: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Analysis:
    """What a run found, as tables and sentences: everything that it has data for.

    Always: an interval of each sample's hardness, how it agrees between levels, subgroups of the
    hardest. From kept logits (`keep_logits`): PIEs, levels, forgettability, class impact and ratios,
    links to frequency and co-occurrence, stability. From kept features (`keep_features`), with labels:
    *label in doubt*, *hard* and *atypical*, best from those of early stages
    (`fastpie.dual.stage_features`). From the data set: image quality and duplicates.

    Args:
        run: of any task, finished or not.
        dataset: the run's data set, to look at its images; every one is read once.
        class_names: in index order; by default the data set's attribute `class_names`.
        train_counts: positives of each class in the training set; by default the labels of the run.
        sparsity: the level at which PIEs, classes and models are compared; by default the highest of
            the run, with `compat` .9.
        fraction: of the samples that counts as hard, in doubt, and (where it ranks) as PIE.
        definition: of PIEs, see `fastpie.pie`; by default "spearman" (multilabel) or "modal".
        metric: whose forgettability curves: "ap", "auroc" or "recall".
        compat: "prunecxr": the public script's ranking of PIEs and its counts of pairs.
        control: a run of the same samples with random masks.
        records: `fastpie.mining.Recorder.result()` of the training.
        out_of_sample: probabilities by models that were trained without the sample; see
            `fastpie.analysis.label_in_doubt`.
        attributes: of the manifest, for subgroups; see `fastpie.analysis.subgroups`.
        intersections: also subgroups by two attributes.
        seed: of permutations and resamples.
        progress: whether to show a bar while images are read; by default where stderr is a terminal.

    Returns:
        Analysis. `facts` says how each column of `samples` was made.

    Raises:
        FastpieError: for a run without rows, options that do not fit it, or without SciPy and
            scikit-learn (`fastpie[analysis]`).
    """
    run = run if isinstance(run, MiningResult) else MiningResult(run)
    table = run.table
    if not table.num_rows:
        raise FastpieError(f"Expected a run with scored samples, but {run.location} has none.")
    config = run.record["config"]
    if class_names is None:
        class_names = getattr(dataset, "class_names", None)
    facts: dict[str, Any] = {
        "run": run.record["fingerprints"], "samples": len(table), "task": config["task"],
        "models": max(1, len(run.members)), "sparsities": config["sparsities"],
        "fraction": fraction, "hard": run.record["hardness"],
    }  # fmt: skip
    tables: dict[str, pa.Table] = {}
    columns: dict[str, Any] = {"sample_id": table.column("sample_id")}
    hardness = _numbers(table, "hardness")

    predictions = None
    if config["keep_logits"] and config["task"] in DEFAULT_DEFINITIONS:
        predictions = Predictions.of_run(run, class_names=class_names, train_counts=train_counts)
        against = None if control is None else Predictions.of_run(control, class_names=class_names)
        chosen = analyze_predictions(
            predictions,
            sparsity=sparsity,
            fraction=fraction,
            definition=definition,
            metric=metric,
            compat=compat,
            control=against,
            hardness=hardness,
            seed=seed,
        )
        tables |= chosen.tables
        facts |= chosen.facts
    elif control is not None:
        raise FastpieError("Expected a classifier's run with its logits kept beside `control`.")
    elif config["is_ladder"]:
        tables["stability"] = _levels_of_hardness(run, fraction)

    hard, doubt, odd = hardness, None, None
    labelled = bool(run.record["labelled"])
    if config["keep_features"]:
        widths = run.record.get("feature_widths") if not run.members else None
        features = standardised(run_features(run), widths)
        neighbours = nearest_neighbours(features, _NEIGHBOURS, metric="euclidean")
        odd = atypical(neighbours)
        facts["atypical"] = (
            f"mean distance to the {_NEIGHBOURS} nearest neighbours in the features "
            f"{config['features']}, standardised"
        )
        if labelled:
            hard = _conflict(run, features)
            facts["hard"] = (
                f"own / (own + other), mean distances to the {_CONFLICT_NEIGHBOURS} nearest "
                f"neighbours with the same and with another label in the features "
                f"{config['features']}, standardised"
            )
    else:
        features = None
    if labelled:
        doubt = label_in_doubt(
            run,
            predictions=predictions,
            features=features,
            epochs=records,
            out_of_sample=out_of_sample,
        )
        facts["label_in_doubt"] = doubt.formula
        if predictions is not None and importlib.util.find_spec("cleanlab") is not None:
            tables["agreement"] = cleanlab_agreement(doubt, predictions, fraction=fraction)
    low, high = hardness_interval(hardness_values(run)[0], seed=seed)
    columns["hard"], columns["hardness"] = _column(hard), _column(hardness)
    columns["hardness_low"], columns["hardness_high"] = _column(low), _column(high)
    if predictions is not None:
        columns["pie"] = pa.array(np.isin(np.arange(len(table)), facts.pop("pie_rows")))
    columns["label_in_doubt"] = (
        pa.nulls(len(table), pa.float64()) if doubt is None else doubt.samples["label_in_doubt"]
    )
    if doubt is not None:
        for name in ("label_margin", "doubtful_class"):
            columns[name] = doubt.samples[name]
    columns["atypical"] = pa.nulls(len(table), pa.float64()) if odd is None else _column(odd)
    places = quadrants(
        hard,
        np.full(len(table), np.nan) if doubt is None else _numbers(doubt.samples, "label_in_doubt"),
        odd,
        fraction=fraction,
    )
    columns["quadrant"], columns["is_atypical"] = places["quadrant"], places["is_atypical"]
    samples = pa.table(columns)
    if dataset is not None:
        samples = _joined(samples, image_quality(dataset, run, progress=progress))
    tables["subgroups"] = subgroups(
        _attributes(run),
        hard,
        fraction=fraction,
        attributes=attributes,
        class_names=class_names,
        pairs=intersections,
    )
    facts["quadrants"] = {
        str(row["values"]): row["counts"]
        for row in pc.value_counts(samples["quadrant"]).to_pylist()
    }
    analysis = Analysis(samples, tables, facts, [])
    return Analysis(samples, tables, facts, sentences(analysis))


def analyze_predictions(
    predictions: Predictions,
    *,
    sparsity: float | None = None,
    fraction: float = 0.05,
    definition: str | None = None,
    metric: str = "ap",
    compat: str | None = None,
    control: Predictions | None = None,
    hardness: np.ndarray | None = None,
    seed: int = 0,
) -> Analysis:
    """What predictions alone tell: of a study that is already there, say.

    Args:
        predictions: of one model or of several; without labels PIEs and stability only.
        sparsity: see `analyze`, as for all arguments below.
        fraction: of the samples.
        definition: of PIEs.
        metric: whose curves.
        compat: "prunecxr" or None.
        control: with random masks.
        hardness: [N], one more definition in `stability`.
        seed: of permutations and resamples.

    Returns:
        Analysis whose `samples` have `sample_id` and `pie`; `facts["pie_rows"]` are their rows,
        hardest first.

    Raises:
        FastpieError: for options that do not fit the predictions.
    """
    if compat not in (None, "prunecxr"):
        raise FastpieError(f"Expected `compat` to be None or 'prunecxr', but got {compat!r}.")
    if compat is not None and sparsity is None:
        sparsity = _PRUNECXR_SPARSITY
    level = predictions.level(sparsity)
    sparsity = predictions.sparsities[level]
    if definition is None:
        definition = "spearman" if compat else DEFAULT_DEFINITIONS[predictions.task]
    dense, pruned = predictions.probabilities(), predictions.probabilities(level)
    if compat is not None:  # the script has fp32 probabilities
        dense, pruned = dense.astype(np.float32), pruned.astype(np.float32)
    rows = exemplars(dense, pruned, definition, fraction, task=predictions.task, compat=compat)
    tables: dict[str, pa.Table] = {}
    facts: dict[str, Any] = {
        "models": predictions.models, "samples": predictions.samples, "task": predictions.task,
        "sparsities": predictions.sparsities, "sparsity": sparsity, "fraction": fraction,
        "definition": definition, "compat": compat, "metric": metric, "pies": len(rows),
        "pie_rows": rows.tolist(),
    }  # fmt: skip
    pie = np.isin(np.arange(predictions.samples), rows)
    if predictions.labels is not None:
        measured = measure(predictions, seed=seed)
        tables["levels"] = levels(measured)
        facts["first_significant"] = {
            name: first_significant(tables["levels"], name) for name in OVERALL[predictions.task]
        }
        tables["curves"] = curves(measured)
        labels = predictions.positives()
        names = predictions.class_names
        tables["classes"] = _side_by_side(
            [
                class_changes(measured, level=level, metric=metric),
                class_impact(predictions, sparsity),
                class_ratios(labels, pie, names, seed=seed),
            ]
        )
        of_pairs = pairs(predictions, measured, metric=metric, compat=compat)
        tables["links"] = pa.concat_tables(
            [links(measured, metric=metric, seed=seed), pair_links(of_pairs, seed=seed)]
        )
        tables["pairs"] = of_pairs
        tables["regression"] = regression(of_pairs, seed=seed)
        if predictions.task == "multilabel":
            tables["counts"] = count_ratios(labels, pie, names, seed=seed)
    tables["stability"] = stability(
        predictions,
        definition=definition,
        sparsity=sparsity,
        fraction=fraction,
        control=control,
        hardness=hardness,
    )
    if control is not None:
        facts["control"] = control_share(
            predictions, control, definition=definition, sparsity=sparsity, fraction=fraction
        )
    ids = predictions.sample_ids or [str(i) for i in range(predictions.samples)]
    samples = pa.table({"sample_id": ids, "pie": pie})
    analysis = Analysis(samples, tables, facts, [])
    return Analysis(samples, tables, facts, sentences(analysis))


def _side_by_side(tables: list[pa.Table]) -> pa.Table:
    """Tables with the same classes in the same order, as one."""
    whole = tables[0]
    for table in tables[1:]:
        for name in table.column_names:
            if name != "class":
                whole = whole.append_column(name, table.column(name))
    return whole


def _levels_of_hardness(run: MiningResult, fraction: float) -> pa.Table:
    values, over = hardness_values(run)
    sparsities = run.record["config"]["sparsities"]
    names = [f"{s:g}" for s in sparsities] if over == "level" else map(str, range(len(values)))
    return stability_of_scores(
        over, dict(zip(names, values.astype(np.float64), strict=True)), fraction=fraction
    )


def _conflict(run: MiningResult, features: np.ndarray) -> np.ndarray:  # fp64 [N]
    """`label_conflict`, of several labels the largest of a sample's classes."""
    task = run.record["config"]["task"]
    column = run.table.column("label")
    if task == "multilabel":
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        labels = flat.reshape(run.table.num_rows, -1)
    else:
        labels = column.fill_null(-1).to_numpy()
    found = label_conflict(features, labels, _CONFLICT_NEIGHBOURS, metric="euclidean", task=task)
    if found.ndim == 1:
        return found
    worst: np.ndarray = np.where(np.isnan(found), -np.inf, found).max(1, initial=-np.inf)
    return np.where(np.isinf(worst), np.nan, worst)


def _attributes(run: MiningResult) -> pa.Table:
    """Labels of the run and what else the manifest knows, in the order of the run's table."""
    table = run.table
    found = pa.table({"sample_id": table.column("sample_id")})
    if run.manifest is not None:
        rows = pc.index_in(
            table.column("sample_id").cast(pa.large_string()),
            run.manifest.column("sample_id").cast(pa.large_string()),
        )
        found = run.manifest.take(rows)
        if "label" in found.column_names:
            found = found.drop_columns(["label"])
    if "label" in table.column_names:
        found = found.append_column("label", table.column("label"))
    return found


def _joined(samples: pa.Table, images: pa.Table) -> pa.Table:
    """Columns of the images beside the samples, null where an image has no row."""
    rows = pc.index_in(
        samples["sample_id"].cast(pa.large_string()), images["sample_id"].cast(pa.large_string())
    )
    taken = images.take(rows)
    for name in images.column_names:
        if name != "sample_id":
            samples = samples.append_column(name, taken.column(name))
    return samples


def _numbers(table: pa.Table, name: str) -> np.ndarray:  # fp64 [N], null as NaN
    values: np.ndarray = table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _column(values: np.ndarray) -> pa.Array:
    return pa.array(np.asarray(values, np.float64), from_pandas=True)
