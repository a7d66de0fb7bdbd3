"""What outputs and features say about a sample: the formulas behind the scores, in NumPy.

Written apart from `fastpie` on purpose: the benchmark holds scores against each other, the peers'
among them, and computes all of them the same way. Outputs are logits [..., N, C]; labels are int64
[N], or fp32 [N, C] of 1 and 0 for several labels an image.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logsumexp, softmax
from scipy.stats import rankdata

__all__ = [
    "as_ranks", "correct", "el2n", "entropy", "js", "loss", "margin", "predicted", "probability",
    "spearman",
]  # fmt: skip


def loss(z: np.ndarray, y: np.ndarray) -> np.ndarray:  # [..., N]
    """Cross-entropy, or the binary one summed over the classes."""
    if y.ndim == 2:
        summed: np.ndarray = (np.logaddexp(0, z) - y * z).sum(-1)
        return summed
    z = z.astype(np.float64)
    # By the others' logits: 1 - p of a memorised image is not lost to rounding.
    others = np.where(np.arange(z.shape[-1]) == y[:, None], -np.inf, z)
    result: np.ndarray = np.logaddexp(0, logsumexp(others, axis=-1) - _at(z, y))
    return result


def margin(z: np.ndarray, y: np.ndarray) -> np.ndarray:  # [..., N]
    """The label's logit less the best other; of several labels the worst class's, signed."""
    if y.ndim == 2:
        signed: np.ndarray = ((2 * y - 1) * z).min(-1)
        return signed
    own = _at(z, y)
    others = np.where(np.arange(z.shape[-1]) == y[:, None], -np.inf, z)
    result: np.ndarray = own - others.max(-1)
    return result


def probability(z: np.ndarray, y: np.ndarray) -> np.ndarray:  # [..., N]
    """Of the label; of several labels the mean over the classes of what is given."""
    if y.ndim == 1:
        return _at(softmax(z.astype(np.float64), axis=-1), y)
    p = expit(z.astype(np.float64))
    result: np.ndarray = np.where(y > 0, p, 1 - p).mean(-1)
    return result


def el2n(z: np.ndarray, y: np.ndarray) -> np.ndarray:  # [..., N]
    """L2 distance of the probabilities from the labels (Paul et al., arXiv 2107.07075)."""
    multilabel = y.ndim == 2
    p = expit(z) if multilabel else softmax(z, axis=-1)
    truth = y if multilabel else np.eye(z.shape[-1])[y]
    result: np.ndarray = np.linalg.norm(p - truth, axis=-1)
    return result


def correct(z: np.ndarray, y: np.ndarray) -> np.ndarray:  # bool [..., N]
    """Whether the prediction is the label, in all classes where there are several."""
    right: np.ndarray = predicted(z, y.ndim == 2) == y
    return right.all(-1) if y.ndim == 2 else right


def predicted(z: np.ndarray, multilabel: bool) -> np.ndarray:
    """The class, or 1 for each class above probability .5."""
    result: np.ndarray = (z > 0).astype(np.float32) if multilabel else z.argmax(-1)
    return result


def entropy(z: np.ndarray, multilabel: bool) -> np.ndarray:  # [..., N]
    """Of the softmax, or of the classes' sigmoids, summed."""
    return _entropy(expit(z)) if multilabel else _plogp(softmax(z, axis=-1))


def js(a: np.ndarray, b: np.ndarray, multilabel: bool) -> np.ndarray:  # [..., N]
    """Jensen-Shannon divergence of two models' predictions, in nats."""
    if multilabel:
        p, q = expit(a), expit(b)
        return (_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2) / a.shape[-1]
    p, q = softmax(a, axis=-1), softmax(b, axis=-1)
    return _plogp((p + q) / 2) - (_plogp(p) + _plogp(q)) / 2


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # [..., N]
    """Rank correlation over the classes; NaN for a constant row."""
    first, second = rankdata(a, axis=-1), rankdata(b, axis=-1)
    first -= first.mean(-1, keepdims=True)
    second -= second.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: np.ndarray = (first * second).sum(-1) / np.sqrt(
            (first**2).sum(-1) * (second**2).sum(-1)
        )
    return result


def as_ranks(score: np.ndarray) -> np.ndarray:
    """Ranks in (0, 1], ties their mean."""
    ranks: np.ndarray = rankdata(score) / len(score)
    return ranks


def _at(values: np.ndarray, y: np.ndarray) -> np.ndarray:
    index = np.broadcast_to(y[:, None], (*values.shape[:-1], 1))
    result: np.ndarray = np.take_along_axis(values, index, -1)[..., 0]
    return result


def _plogp(p: np.ndarray) -> np.ndarray:
    result: np.ndarray = -(p * np.log(p + 1e-30)).sum(-1)
    return result


def _entropy(p: np.ndarray) -> np.ndarray:
    return _plogp(p) + _plogp(1 - p)
