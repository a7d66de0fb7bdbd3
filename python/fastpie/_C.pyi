"""Types of the native module; see csrc/bindings.cpp."""

cuda_architectures: str | None
cuda_version: str
cuda_max_classes: int

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
