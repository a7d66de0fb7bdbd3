"""`fastpie analyze` and `fastpie report`: what a run found, and the page that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastpie.cli.data import NOTE, open_data
from fastpie.cli.options import Json, Unpickle, load_model, messages, names, print_json
from fastpie.errors import FastpieError

if TYPE_CHECKING:
    import fastpie
    from fastpie.analysis import Analysis
    from fastpie.data import ManifestDataset
    from fastpie.mining import MiningResult

__all__ = ["analyze", "report"]

FOLDER = "analysis"
"""Of an analysis, in the run folder."""

Run = Annotated[Path, typer.Argument(help="Run folder.")]
ShowIds = Annotated[
    bool, typer.Option("--show-ids", help="Show sample ids, paths and free texts in the report.")
]
HeatMaps = Annotated[
    int,
    typer.Option(min=0, help="Of how many samples; needs the model that the run was made with."),
]
Thumbnails = Annotated[
    int, typer.Option(min=0, max=5000, help="Samples in the report's gallery at most.")
]


def analyze(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="Folder; by default analysis/ in the run folder.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Level to analyse; by default the highest.")
    ] = None,
    fraction: Annotated[
        float, typer.Option(help="Of the samples, that counts as hard, as in doubt, as PIE.")
    ] = 0.05,
    definition: Annotated[
        str, typer.Option(help="Of exemplars: spearman, modal, vote, taxicab, js, margin or flip.")
    ] = "",
    metric: Annotated[str, typer.Option(help="Of the curves: ap, auroc or recall.")] = "ap",
    compat: Annotated[
        str, typer.Option(help="prunecxr: rank and count as the public script does.")
    ] = "",
    control: Annotated[
        Path | None, typer.Option(help="Run of the same samples with random masks.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="Folder of a fastpie.mining.Recorder of the training.")
    ] = None,
    train_split: Annotated[
        str, typer.Option(help="Split of the same manifest to count training labels in.")
    ] = "",
    attributes: Annotated[
        str, typer.Option(help="Of the manifest, for subgroups, with commas; by default all.")
    ] = "",
    intersections: Annotated[
        bool, typer.Option("--intersections", help="Also subgroups by two attributes.")
    ] = False,
    images: Annotated[
        bool, typer.Option(help="Read every image to find blurred, dark, blank ones and copies.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of permutations and resamples.")] = 0,
    report: Annotated[bool, typer.Option(help="Write report.html and the plots.")] = True,
    thumbnails: Thumbnails = 1000,
    heat_maps: HeatMaps = 48,
    show_ids: ShowIds = False,
    unpickle: Unpickle = False,
    as_json: Json = False,
) -> None:
    """Say what a run found: tables, sentences, plots and a report."""
    import fastpie
    from fastpie.analysis.analyze import analyze as analyze_run

    result = fastpie.MiningResult(run)
    dataset = _dataset(result)
    analysis = analyze_run(
        result,
        dataset=dataset if images else None,
        class_names=None if dataset is None else dataset.class_names,
        train_counts=_train_counts(result, train_split) if train_split else None,
        sparsity=sparsity,
        fraction=fraction,
        definition=definition or None,
        metric=metric,
        compat=compat or None,
        control=control,
        records=None if records is None else _records(records),
        attributes=names(attributes) or None,
        intersections=intersections,
        seed=seed,
    )
    folder = analysis.save(out or result.path / FOLDER)
    page = plots = None
    if report:
        plots = folder / "plots"
        page = _write(
            result, analysis, dataset, folder, plots,
            thumbnails=thumbnails, heat_maps=heat_maps, show_ids=show_ids, unpickle=unpickle,
        )  # fmt: skip
    if as_json:
        print_json(
            {
                "analysis": str(folder),
                "tables": {name: table.num_rows for name, table in analysis.tables.items()},
                "facts": dict(analysis.facts),
                "sentences": analysis.sentences,
                "report": None if page is None else str(page),
            }
        )
        return
    for sentence in analysis.sentences:
        typer.echo(sentence)
    messages.print(f"tables: {folder}", markup=False)
    if page is not None:
        messages.print(f"plots: {plots}\nreport: {page}", markup=False)


def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="By default report.html in the run folder.")
    ] = None,
    thumbnails: Thumbnails = 1000,
    heat_maps: HeatMaps = 48,
    show_ids: ShowIds = False,
    unpickle: Unpickle = False,
    as_json: Json = False,
) -> None:
    """Write the report of a run, finished or not, with images if their files are still there."""
    import fastpie
    from fastpie.analysis import Analysis
    from fastpie.report import write_report

    result = fastpie.MiningResult(run)
    dataset = _dataset(result)
    analysis = None
    if (result.path / FOLDER).is_dir():
        try:
            analysis = Analysis.load(result.path / FOLDER)
        except FastpieError as error:
            messages.print(f"The report has no analysis: {error}", markup=False)
    path = write_report(
        result,
        out,
        analysis=analysis,
        dataset=dataset,
        class_names=None if dataset is None else dataset.class_names,
        thumbnails=thumbnails,
        dual=None if dataset is None else _dual(result, unpickle, heat_maps),
        heat_maps=heat_maps,
        show_ids=show_ids,
    )
    if as_json:
        print_json({"report": str(path), "samples": len(result), "errors": result.errors.num_rows})
    else:
        typer.echo(path)


def _write(
    result: MiningResult,
    analysis: Analysis,
    dataset: ManifestDataset | None,
    folder: Path,
    plots: Path,
    *,
    thumbnails: int,
    heat_maps: int,
    show_ids: bool,
    unpickle: bool,
) -> Path | None:
    from fastpie.report import write_plots, write_report

    class_names = None if dataset is None else dataset.class_names
    try:
        write_plots(result, analysis, plots)
        return write_report(
            result,
            analysis=analysis,
            dataset=dataset,
            class_names=class_names,
            thumbnails=thumbnails,
            dual=None if dataset is None else _dual(result, unpickle, heat_maps),
            heat_maps=heat_maps,
            show_ids=show_ids,
        )
    except FastpieError as error:
        messages.print(f"No report: {error}", markup=False)
        return None


def _note(result: MiningResult) -> dict[str, Any]:
    """What `fastpie mine` noted of the run; empty for one that the library made."""
    note = result.record.get("note")
    ours = note.get(NOTE) if isinstance(note, dict) else None
    return ours if isinstance(ours, dict) else {}


def _dataset(result: MiningResult) -> ManifestDataset | None:
    """The run's data set, where the run knows it and it can still be opened."""
    source = _note(result).get("data")
    if source is None:
        return None
    try:
        return open_data(source)
    except FastpieError as error:
        messages.print(f"There are no images: {error}", markup=False)
        return None


def _dual(result: MiningResult, unpickle: bool, heat_maps: int) -> fastpie.DualModel | None:
    """The run's dual model, of several the first, where the run knows it and it can be loaded."""
    from fastpie.mining.restore import dual_of_run

    known = _note(result).get("model")
    if known is None or not heat_maps:
        return None
    try:
        weights = Path(known["weights"][0]) if known["weights"] else None
        model = load_model(known["factory"], known["arguments"], weights, unpickle, quiet=True)
        return dual_of_run(result.members[0] if result.members else result, model)
    except (FastpieError, typer.BadParameter) as error:
        messages.print(f"There are no heat maps: {error}", markup=False)
        return None


def _records(folder: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "samples.parquet"
    try:
        return pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise FastpieError(
            f"Expected the records of a training at {path}, but: {error}."
        ) from error


def _train_counts(result: MiningResult, split: str) -> Any:
    """Positives of each class in a split of the run's manifest."""
    import numpy as np

    source = _note(result).get("data")
    if source is None:
        raise FastpieError(
            "Expected a run of `fastpie mine`, which notes its manifest, for --train-split."
        )
    manifest = open_data({**source, "split": split, "cache": None}).manifest
    column = manifest.table.column("label").combine_chunks()
    if manifest.task == "multilabel":
        flat = column.flatten().to_numpy(zero_copy_only=False).reshape(len(manifest), -1)
        return np.nansum(flat, axis=0).astype(np.int64)
    known = column.to_numpy(zero_copy_only=False)
    classes = len(manifest.class_names or []) or int(known.max(initial=-1)) + 1
    return np.bincount(known[known >= 0].astype(np.int64), minlength=classes)
