"""Types of the native module; see csrc/bindings.cpp."""

from typing import Any, TypeAlias

cuda_architectures: str | None
cuda_version: str
cuda_emulated: bool
address_sanitizer: bool
cuda_max_classes: int
magnitude_tile: int

def cpu_capability() -> str: ...
def cpu_capabilities() -> list[str]: ...
def has_openmp_runtime() -> bool: ...
def cuda_unusable_reason() -> str: ...
def null_cpu(input: int, output: int, count: int, threads: int) -> None: ...
def null_cuda(input: int, output: int, count: int, stream: int) -> None: ...
def disagreement_cpu(
    dense: int,
    pruned: int,
    labels: int,
    out: int,
    dtype: int,
    task: int,
    levels: int,
    rows: int,
    classes: int,
    dense_row_stride: int,
    pruned_level_stride: int,
    pruned_row_stride: int,
    threads: int,
) -> None: ...
def disagreement_cuda(
    dense: int,
    pruned: int,
    labels: int,
    out: int,
    dtype: int,
    task: int,
    levels: int,
    rows: int,
    classes: int,
    dense_row_stride: int,
    pruned_level_stride: int,
    pruned_row_stride: int,
    stream: int,
) -> None: ...
def segmentation_disagreement_workspace(levels: int, images: int, pixels: int, /) -> int: ...
def segmentation_disagreement_cpu(
    dense: int,
    dense_strides: tuple[int, ...],
    pruned: int,
    pruned_strides: tuple[int, ...],
    partials: int,
    out: int,
    dtype: int,
    sizes: tuple[int, ...],
    threads: int,
    /,
) -> None: ...
def segmentation_disagreement_cuda(
    dense: int,
    dense_strides: tuple[int, ...],
    pruned: int,
    pruned_strides: tuple[int, ...],
    partials: int,
    out: int,
    dtype: int,
    sizes: tuple[int, ...],
    stream: int,
    /,
) -> None: ...
def embedding_disagreement_cpu(
    dense: int,
    dense_strides: tuple[int, ...],
    pruned: int,
    pruned_strides: tuple[int, ...],
    out: int,
    dtype: int,
    sizes: tuple[int, ...],
    threads: int,
    /,
) -> None: ...
def embedding_disagreement_cuda(
    dense: int,
    dense_strides: tuple[int, ...],
    pruned: int,
    pruned_strides: tuple[int, ...],
    out: int,
    dtype: int,
    sizes: tuple[int, ...],
    stream: int,
    /,
) -> None: ...
def top_k_update_cuda(
    values: int,
    ids: int,
    k: int,
    scores: int,
    levels: int,
    count: int,
    level_stride: int,
    new_ids: int,
    first_id: int,
    stream: int,
) -> None: ...

_PackedWeights: TypeAlias = tuple[int, int, int, int, int]
_Activations: TypeAlias = tuple[int, int, int]
_Tiles: TypeAlias = tuple[int, int, int]

def masked_conv_cpu(
    weights: _PackedWeights,
    bias: int,
    input: _Activations,
    output: _Activations,
    residual: _Activations,
    tiles: _Tiles,
    dtype: int,
    groups: int,
    activation: int,
    slope: float,
    threads: int,
    /,
) -> None: ...
def masked_conv_chain_cpu(
    layers: list[tuple[_PackedWeights, int, _Activations, _Activations, _Activations, int, float]],
    lags: list[int],
    tiles: _Tiles,
    dtype: int,
    groups: int,
    threads: int,
    /,
) -> None: ...
def masked_conv_weight_gradient_cpu(
    weights: _PackedWeights,
    input: _Activations,
    output_gradient: _Activations,
    tiles: _Tiles,
    groups: int,
    gradient: int,
    threads: int,
    /,
) -> None: ...
def count_masked_conv(*args: Any) -> tuple[int, int]: ...
def pack_masked_conv(entries: int, rows: int, order: int, /, *args: Any) -> None: ...
def count_sparse24(
    keep: int, filters: int, columns: int, rows: int, tiles: int, threads: int, /
) -> None: ...
def pack_sparse24(
    keep: int,
    filters: int,
    columns: int,
    rows: int,
    step_begin: int,
    copy_begin: int,
    order: int,
    metadata: int,
    copies: int,
    threads: int,
    /,
) -> None: ...
def sparse24_conv_cuda(
    input: int,
    packed: tuple[int, int, int, int, int],
    scale: int,
    bias: int,
    residual: int,
    output: int,
    dtype: int,
    sizes: tuple[int, int, int, int, int],
    input_size: tuple[int, ...],
    output_size: tuple[int, ...],
    window: tuple[tuple[int, ...], ...],
    activation: int,
    slope: float,
    stream: int,
    /,
) -> None: ...
def max_pool_cpu(
    input: int,
    input_strides: tuple[int, int, int, int],
    input_size: tuple[int, int, int],
    output: int,
    output_strides: tuple[int, int, int, int],
    output_size: tuple[int, int, int],
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
    dtype: int,
    groups: int,
    channels: int,
    images: int,
    threads: int,
    /,
) -> None: ...
def masked_conv_nhwc_cuda(
    models: list[tuple[int, int, int, int, int, int]],
    weight: int,
    counts: tuple[int, int, int, int],
    sizes: tuple[tuple[int, ...], ...],
    dtype: int,
    activation: int,
    slope: float,
    tile: int,
    stream: int,
    /,
) -> None: ...
def masked_conv_nhwc_tiles() -> list[list[int]]: ...
def relayout_cpu(
    input: int,
    input_dtype: int,
    input_strides: tuple[int, ...],
    output: int,
    output_dtype: int,
    output_strides: tuple[int, ...],
    sizes: tuple[int, ...],
    scale: int,
    shift: int,
    activation: int,
    slope: float,
    threads: int,
    /,
) -> None: ...
def pack_mask_cpu(
    codes: int, words: int, sizes: tuple[int, int, int], level: int, threads: int, /
) -> None: ...
def pack_mask_cuda(
    codes: int, words: int, sizes: tuple[int, int, int], level: int, stream: int, /
) -> None: ...
def alias_table_cpu(weights: int, probability: int, alias: int, count: int, /) -> None: ...
def magnitude_levels_cuda(
    tensors: int,
    counts: int,
    sizes: tuple[int, int, int, int],
    codes: int,
    nonfinite: int,
    blocks: int,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def magnitude_levels_workspace(levels: int, blocks: int, /) -> int: ...
def normalize_uint8_cuda(
    images: int,
    strides: tuple[int, int, int],
    mean: int,
    std: int,
    output: int,
    dtype: int,
    sizes: tuple[int, int, int, int],
    stream: int,
    /,
) -> None: ...
