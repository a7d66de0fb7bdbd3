"""The operator `segmentation_disagreement` inside torch, and against outside references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scipy.spatial import distance
from torch import Tensor

from fastpie import _C, FastpieError, ops
from segmentation_cases import assert_close_to_twin, logits


def example(classes: int = 3, size: tuple[int, ...] = (4, 5), **kwargs) -> tuple[Tensor, Tensor]:
    dense, pruned = torch.randn(2, classes, *size), torch.randn(3, 2, classes, *size)
    return tuple(x.to(**kwargs) if kwargs else x for x in (dense, pruned))


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_soft_iou_is_ruzickas_and_follows_from_bray_curtis(classes: int) -> None:
    dense, pruned = logits("plain", 2, 3, classes, (20, 21), torch.float32)
    got = ops.segmentation_disagreement(dense, pruned)[1]
    for level in range(2):
        for image in range(3):
            p, q = (
                special.expit(x) if classes == 1 else special.softmax(x, 0)[1:]
                for x in (dense[image].double().numpy(), pruned[level, image].double().numpy())
            )
            unlike = distance.braycurtis(p.ravel(), q.ravel())  # sum |p - q| / sum (p + q)
            assert float(got[level, image]) == pytest.approx((1 - unlike) / (1 + unlike), rel=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_hard_iou_is_that_of_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is an extra")
    dense, pruned = logits("ties", 1, 3, classes, (20, 21), torch.float32)
    got = ops.segmentation_disagreement(dense, pruned)[0, 0]
    for image in range(3):
        z, y = (
            (x[0] > 0).int() if classes == 1 else x.argmax(0)
            for x in (dense[image], pruned[0, image])
        )
        labels = list(range(1, max(classes, 2)))
        want = metrics.jaccard_score(z.ravel(), y.ravel(), labels=labels, average="micro")
        assert float(got[image]) == pytest.approx(want, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 4), st.integers(1, 18))
def test_any_image_scores_as_the_twin_says(data: st.DataObject, classes: int, pixels: int) -> None:
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38, 1e-38])
    value = st.one_of(st.floats(-5, 5, width=32), finite, values)
    count = 2 * classes * pixels
    flat = data.draw(st.lists(value, min_size=count, max_size=count))
    dense, pruned = torch.tensor(flat, dtype=torch.float32).view(2, 1, classes, pixels)
    pruned = pruned.unsqueeze(0)
    got = ops.segmentation_disagreement(dense, pruned)
    # Where a whole image has hardly any foreground, fp32 may end below the contract's 1e-30 or
    # above it where fp64 does not.
    z, y = (x.double().nan_to_num(0, 0) for x in (dense, pruned[0]))
    p, q = (x.sigmoid() if classes == 1 else x.softmax(1)[:, 1:] for x in (z, y))
    if float(torch.maximum(p, q).nan_to_num(0).sum()) > 1e-29:
        assert_close_to_twin(got, dense, pruned)
    assert ((got >= 0) & (got <= 1) | got.isnan()).all()


def test_fp64_logits_give_fp64() -> None:
    dense, pruned = example(dtype=torch.float64)
    scores = ops.segmentation_disagreement(dense, pruned)
    assert scores.dtype is torch.float64
    assert torch.equal(scores, ops.reference.segmentation_disagreement(dense, pruned))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
def test_operator_passes_torch_opcheck(classes: int, gradients: bool) -> None:
    arguments = tuple(x.requires_grad_(gradients) for x in example(classes))
    torch.library.opcheck(torch.ops.fastpie.segmentation_disagreement.default, arguments)


@pytest.mark.parametrize(("classes", "size"), [(1, (4,)), (2, (2, 2)), (3, (1, 2, 2))])
def test_gradients_are_the_numerical_ones(classes: int, size: tuple[int, ...]) -> None:
    dense, pruned = example(classes, size, dtype=torch.float64)
    arguments = [x.requires_grad_() for x in (dense[:1], pruned[:2, :1])]
    assert torch.autograd.gradcheck(lambda d, p: ops.segmentation_disagreement(d, p)[1], arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 4])
def test_gradients_of_the_kernel_are_those_of_plain_torch(classes: int, dtype: torch.dtype) -> None:
    dense, pruned = (x.requires_grad_() for x in example(classes, dtype=dtype))
    ops.segmentation_disagreement(dense, pruned)[1].sum().backward()
    z, y = (x.detach().double().requires_grad_() for x in (dense, pruned))
    p = z.sigmoid() if classes == 1 else z.softmax(1)[:, 1:]
    q = y.sigmoid() if classes == 1 else y.softmax(2)[:, :, 1:]
    lower, upper = torch.minimum(p, q).flatten(2).sum(-1), torch.maximum(p, q).flatten(2).sum(-1)
    (lower / upper).sum().backward()
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    for got, want in ((dense.grad, z.grad), (pruned.grad, y.grad)):
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_hard_iou_has_no_gradient() -> None:
    dense, pruned = (x.requires_grad_() for x in example())
    ops.segmentation_disagreement(dense, pruned)[0].sum().backward()
    assert not dense.grad.any()
    assert not pruned.grad.any()


def test_gradient_reaches_one_side_when_only_one_needs_it() -> None:
    dense, pruned = example()
    ops.segmentation_disagreement(dense, pruned.requires_grad_())[1].sum().backward()
    assert dense.grad is None
    assert pruned.grad.abs().sum() > 0


def test_images_without_a_score_leave_the_gradients_finite_and_take_no_part() -> None:
    dense, pruned = example()
    dense[0, 1, 2, 3] = torch.nan
    pruned[1, 1, 0, 0, 0] = torch.inf
    pruned[2, 1, 2] = -torch.inf  # a class ruled out: not spoiled
    alone = [x.clone().requires_grad_() for x in (dense[1:], pruned[[0, 2]][:, 1:])]
    dense.requires_grad_()
    pruned.requires_grad_()
    ops.segmentation_disagreement(dense, pruned)[1].sum().backward()
    ops.segmentation_disagreement(*alone)[1].sum().backward()
    for grad in (dense.grad, pruned.grad):
        assert grad.isfinite().all()
    assert not dense.grad[0].any()
    assert not pruned.grad[:, 0].any()
    assert not pruned.grad[1].any()
    torch.testing.assert_close(dense.grad[1:], alone[0].grad)
    torch.testing.assert_close(pruned.grad[[0, 2]][:, 1:], alone[1].grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("gradients", [False, True])
def test_operator_compiles_into_one_graph(gradients: bool, backend: str) -> None:
    def function(dense: Tensor, pruned: Tensor) -> Tensor:
        return ops.segmentation_disagreement(dense * 2, pruned).sum()

    results = []
    for compiled in (function, torch.compile(function, backend=backend, fullgraph=True)):
        torch.manual_seed(3)
        dense, pruned = example()
        dense.requires_grad_(gradients)
        value = compiled(dense, pruned)
        if gradients:
            value.backward()
        results.append((value.detach(), dense.grad))
    torch.testing.assert_close(results[0], results[1])


def test_fake_tensors_take_the_shapes_and_dtypes_of_real_ones() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        dense, pruned = example(dtype=dtype)
        real = ops.segmentation_disagreement(dense, pruned)
        meta = ops.segmentation_disagreement(dense.to("meta"), pruned.to("meta"))
        assert meta.is_meta
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_on_every_instruction_set_and_thread_count(
    classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, restore_threads: None
) -> None:
    dense, pruned = logits("plain", 2, 8, classes, (83, 101), dtype)
    for image, kind in enumerate(("near", "ties", "background", "faint", "-inf", "largest")):
        one = logits(kind, 2, 1, classes, (83, 101), dtype)
        dense[image], pruned[:, image] = one[0][0], one[1][:, 0]
    dense[6, 0, 0, 0] = torch.nan
    seen = {}
    for capability in _C.cpu_capabilities():
        monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen[capability, threads] = ops.segmentation_disagreement(dense, pruned)
    first = seen["baseline", 1].numpy()
    assert np.isnan(first[:, :, 6]).all()
    for key, other in seen.items():
        np.testing.assert_array_equal(other.numpy(), first, err_msg=str(key))


Z, P = torch.zeros(2, 3, 4, 4), torch.zeros(1, 2, 3, 4, 4)
REFUSED = {
    "dense_without_pixels": ((torch.zeros(2, 3), torch.zeros(1, 2, 3)), r"\[N, C, H.*\[2, 3\]"),
    "dense_without_classes": ((Z[:, :0], P[:, :, :0]), r"C >= 1.*\[2, 0, 4, 4\]"),
    "pruned_without_levels": ((Z, Z), r"\[L, 2, 3, 4, 4\].*\[2, 3, 4, 4\]"),
    "pruned_of_other_size": ((Z, P[..., :3]), r"\[1, 2, 3, 4, 3\]"),
    "integers": ((Z.long(), P.long()), "int64"),
    "mixed_dtypes": ((Z, P.double()), "float32 and torch.float64"),
    "mixed_devices": ((Z, P.to("meta")), "device.*cpu and meta"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        ops.segmentation_disagreement(*arguments)
