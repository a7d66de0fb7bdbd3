"""`Attention`: mines the training samples that are hard to learn, and says how much to attend to each."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastpie._checks import number, whole_number
from fastpie.dual import DualModel
from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Batch, Problem
from fastpie.mining.rescan import Rescan, check_state
from fastpie.training.attention.attended import ATTEND, Attended, Rule
from fastpie.training.attention.findings import Findings, Guard
from fastpie.training.attention.scores import RANDOM, Scoring
from fastpie.training.attention.strata import codes_of

__all__ = ["Attention"]

_FORMAT = "fastpie-attention-1"


class Attention:
    """Attends to the training samples that are hard to learn (HTL), mined anew as training goes on.

    Put it beside any training loop::

        attention = fastpie.training.Attention(model, train_set_without_augmentation)
        for epoch in range(epochs):
            for images, labels, ids in loader:
                losses = criterion(model(images), labels)  # [n]
                loss = (losses * attention.weights(ids)).mean()
                ...
            attention.step(epoch)

    After a warm-up, every few epochs, a private copy of the model is pruned, the BatchNorm statistics
    of the pruned model are taken from an eighth of the samples (128 to 512), and every sample gets a
    score g of the dense and the pruned model in eval mode, higher = harder. With the momentum b its
    *attention* is

        S = b S + (1 - b) rank01(g)

    rank01 being its place among the samples of its stratum, 0 for the easiest and 1 for the hardest, equal
    scores at the mean of their places; the first time S = rank01(g). The HTL are those of the highest S.
    A sample that cannot be read or has no score (NaN) keeps its S; one that never had one stands at 0.5
    and is no HTL. Source: Attend Who is Weak (arXiv 2212.02675); ranks, guard and scores other than the
    disagreement of both models are ours.

    A very hard sample can be a wrong label, which must not be attended to. So labels are doubted in the
    same pass (`guard`), and the most doubtful of each class are left out.

    The training is not touched: weights, buffers, gradients, modes and random generators are as they
    were. Where `torch.distributed` is initialised every process makes the Attention and calls `step`:
    they share the batches, scored with the model of rank 0, and all know all weights.

    Before the first mining all weights are 1 and nothing is hard.

    Attributes:
        attend: how to attend.
        epochs: after which was mined, increasing.
    """

    def __init__(
        self,
        model: nn.Module | DualModel,
        data: Dataset[Any] | DataLoader[Any],
        *,
        score: str | Callable[..., Any] = "margin_pruned",
        sparsity: float | Sequence[float] = 0.5,
        warmup: int = 10,
        every: int = 5,
        momentum: float = 0.7,
        fraction: float = 0.2,
        per: Any = None,
        attend: str = "soft",
        strength: float = 4.0,
        guard: Any = "auto",
        doubtful: float = 0.05,
        doubtful_weight: float = 0.0,
        task: str = "multiclass",
        seed: int = 0,
        batch_size: int | None = None,
        num_workers: int | None = None,
        read_timeout: float | None = None,
        sample_ids: Sequence[Any] | None = None,
        output: str | int | None = None,
        precision: str = "fp32",
        backend: str = "auto",
        device: str | torch.device | None = None,
    ) -> None:
        """Copy the model and try it on the first samples; nothing is mined yet.

        Scores by name, means over the levels of a ladder:

        =========================  =================================================================
        margin_pruned, _dense      with labels: the label's margin, negated
        loss_pruned, loss_dense,   with labels; segmentation: cross-entropy plus 1 - soft Dice against
        damage                     the masks (`segmentation_loss`); damage = loss_pruned - loss_dense
        js, kl, kl_reverse, flip,  of classifiers, without labels; drift also of embeddings
        drift, spearman (1 - rho)
        iou, iou_soft              segmentation: 1 - IoU of the dense and the pruned masks
        random                     a control: ranks by `seed`, the same each time
        =========================  =================================================================

        The `_dense` ones are controls, too: what pruning adds shows against them.

        Args:
            model: the model that is trained (in DistributedDataParallel or torch.compile or not), pruned
                by magnitude; or a DualModel of it, which gives levels, method, scope, the weights to
                prune and, for a score that is a function, the features.
            data: as for `mine`, the training samples *without* random augmentation.
            score: a name, or a function `score(out, labels)` or `score(out, labels, images)` of a
                `DualOutput`, the collated labels and the model's input that returns one number a
                sample, [n], higher = harder, NaN unknown: of boxes, CAMs, `out.features`. It sees whole
                batches; the last one is filled up with empty images, whose numbers are not used.
            sparsity: a level or a ladder.
            warmup: epochs before the first mining, at least 1: it is after the epoch `warmup - 1`.
            every: epochs from one mining to the next.
            momentum: b above, in [0, 1).
            fraction: of each stratum that is called HTL, in [0, 1]; with strata at least one sample.
            per: the strata: None for one; "label" for the classes (of several labels of a sample the
                rarest positive one); or an attribute's values, in the order of the data set.
            attend: "soft": weights 1 + strength * S; "weights": 1 + strength for the HTL, 1 for others;
                "oversample": `draw_weights` in proportion to the weights of "weights", while the loss's
                are 1: the same in the mean;
                "consistency": weights are 1, and `hard` is for a `Consistency` objective.
            strength: at least 0.
            guard: "margin", "margin_pruned": labels whose margin of the dense or the pruned model is
                lowest within their class, by ranks with the same momentum (after AUM, arXiv 2001.10528);
                of several labels the class that the model speaks for least. "probe": the margin of a
                leave-one-out ridge probe on features (`fastpie.analysis.probe`), those that the
                DualModel names, else of the early stages; what found most wrong labels in
                docs/design/quality.md; it keeps the features of all samples on rank 0 in memory.
                "loss", "loss_pruned": masks that the dense or the pruned model is furthest from
                (`segmentation_loss`), over all samples, by ranks with the same momentum: the mask of
                another image. A function as `score`, or an array in the order of the data set, of doubts
                (higher = more doubtful), compared over all samples. None for none. "auto": of labels of
                classes "margin", of masks (labels of at least two dimensions) "loss", else None; for scores
                of the pruned model alone ("margin_pruned" and "loss_pruned", which then are mined without
                the dense model, in half the time) "margin_pruned" and "loss_pruned".
            doubtful: the fraction that is most in doubt, in [0, 1), of each class (of masks and of
                functions: of all samples), rounded down, so that a class of a few samples loses none.
            doubtful_weight: of these, before the scaling to a mean of 1: 0 leaves them out, 1 counts them as
                samples without attention.
            task: "multiclass", "multilabel", "segmentation" or "embedding".
            seed: of the score "random".
            batch_size: as for `mine`.
            num_workers: as for `mine`.
            read_timeout: as for `mine`.
            sample_ids: as for `mine`.
            output: as for `mine`.
            precision: as for `mine`.
            backend: as for `mine`.
            device: to score on; by default where the model is now.

        Raises:
            FastpieError: for unusable arguments, data or outputs.
        """
        if attend not in ATTEND:
            raise FastpieError(f"Expected `attend` to be one of {ATTEND}, but got {attend!r}.")
        self.attend = attend
        self.epochs: list[int] = []
        self._warmup = whole_number("warmup", warmup, 1)
        self._every = whole_number("every", every, 1)
        self._seed = whole_number("seed", seed, 0)
        rule = Rule(
            momentum=number("momentum", momentum, 0, 1, open_high=True),
            fraction=number("fraction", fraction, 0, 1),
            attend=attend,
            strength=number("strength", strength, 0),
            doubtful=number("doubtful", doubtful, 0, 1, open_high=True),
            doubtful_weight=number("doubtful_weight", doubtful_weight, 0),
        )
        self._rescan = Rescan(
            model,
            data,
            sparsity,
            recalibrated_from=_recalibrated_from,
            features=callable(score)
            or callable(guard)
            or (isinstance(guard, str) and guard == "probe"),
            batch_size=batch_size,
            num_workers=num_workers,
            read_timeout=read_timeout,
            sample_ids=sample_ids,
            precision=precision,
            backend=backend,
            device=device,
        )
        sweep, dual = self._rescan.sweep, self._rescan.follower.dual
        self._plan = sweep.plan
        self._scoring = Scoring(
            score,
            task,
            is_ladder=dual.is_ladder,
            labelled=sweep.kind.label is not None,
            output=output,
        )
        self._guard = Guard(guard, self._scoring, self._plan.order, sweep.kind.label)
        strata = self._strata_of(per)
        count = len(self._plan)
        self._attended = Attended(
            count,
            rule,
            strata=strata,
            by_label=isinstance(per, str),
            doubt_by_class=self._guard.by_class,
        )
        for own in (score, guard):
            if hasattr(own, "bind"):  # CamDisagreement: it looks at the masked weights as well
                own.bind(dual)
        trial = Findings(count, self._scoring, None)  # there are no features yet
        self._rescan.try_out(lambda batch, out: self._account(trial, batch, out))
        if self._guard.name == "probe" and dual.feature_module is None:
            self._rescan.watch_stages()
        if not (self._scoring.needs_dense or self._guard.needs_dense or dual.is_ladder):
            self._rescan.leave_out_dense()
        self._config = {
            "score": self._scoring.name,
            "task": task,
            "momentum": rule.momentum,
            "per": per if strata is None else hashlib.sha256(strata.tobytes()).hexdigest(),
            "guard": self._guard.name,
            "seed": self._seed,
            "output": output,
            **self._rescan.config(),
        }

    @property
    def model(self) -> nn.Module:
        """The module that is trained, out of its wrappers."""
        return self._rescan.follower.model

    def _strata_of(self, per: Any) -> np.ndarray | None:  # int64 [N], by position
        if per is None:
            return None
        if isinstance(per, str):
            if per != "label" or not self._scoring.of_classes:
                raise FastpieError(
                    "Expected `per` to be None, 'label' for data with labels of classes, or the values of "
                    f"an attribute, but got {per!r}."
                )
            return None
        codes = codes_of(per, len(self._plan))
        if codes is None:
            raise FastpieError(
                f"Expected `per` to have a value for each of the {len(self._plan)} samples, in the order "
                f"of the data set, but got {type(per).__name__}"
                + (f" of {len(per)}." if hasattr(per, "__len__") else ".")
            )
        by_position: np.ndarray = codes[self._plan.order]
        return by_position

    # ------------------------------------------------------------------ mining

    def step(self, epoch: int) -> bool:
        """Mine, if it is the epoch's turn: after the epochs warmup - 1, warmup - 1 + every, ...

        Args:
            epoch: that has just ended, counted from 0.

        Returns:
            Whether it was mined: False where it is not its turn, and, with a warning, for an epoch that
            is not later than those mined.

        Raises:
            FastpieError: for weights that are not finite, or no sample that can be scored; what was
                known before stays in force. Single samples that cannot be do not raise: see `errors`.
        """
        epoch = whole_number("epoch", epoch, 0)
        since = epoch + 1 - self._warmup
        if since < 0 or since % self._every:
            return False
        ranks = Ranks()
        try:
            if not self._rescan.goes_on(epoch, self.epochs, ranks, "mined"):
                return False
            findings = Findings(len(self._plan), self._scoring, self._guard)
            shares = self._rescan.run(
                epoch,
                ranks,
                lambda batch, out: self._account(findings, batch, out),
                lambda _: findings.share(),
            )
            findings.merge([share for _, share in shares], ranks)
        finally:
            ranks.close()
        score = findings.hardness
        if self._scoring.name == RANDOM:
            numbers = np.random.default_rng(self._seed).random(len(score))
            score = np.where(np.isnan(score), np.nan, numbers)
        self._attended.take(score, findings.doubt, findings.classes())
        self.epochs = [*self.epochs, epoch]
        return True

    def _account(
        self, findings: Findings, batch: Batch, out: DualOutput
    ) -> tuple[list[int], list[Problem]]:
        return findings.account(batch, out, lambda: self._rescan.sweep.arguments(batch.images))

    # ------------------------------------------------------------------ what to attend to

    def weights(
        self, ids: Sequence[Any] | Tensor, device: str | torch.device | None = None
    ) -> Tensor:  # fp32 [n]
        """What to multiply the losses of samples with; 1 in the mean over the data set.

        With "oversample" and "consistency" 1 for all; with the latter, those in doubt aside.

        Args:
            ids: of any samples of the data set: as it names them, text, or integers, also in a tensor.
            device: of the result; by default the CPU.

        Raises:
            FastpieError: for an id that is not in the data set.
        """
        found = self._plan.find(_listed(ids))
        weights = torch.ones(len(found))
        if self.attend != "oversample":
            weights = torch.from_numpy(self._attended.weights[found]).float()
        return weights.to(device)

    def hard(
        self, ids: Sequence[Any] | Tensor, device: str | torch.device | None = None
    ) -> Tensor:  # bool [n]
        """Which samples are hard to learn (HTL); arguments and errors as of `weights`."""
        return torch.from_numpy(self._attended.hard[self._plan.find(_listed(ids))]).to(device)

    def draw_weights(self, ids: Sequence[Any] | None = None) -> np.ndarray | None:  # fp64 [N]
        """Probabilities to draw the samples of an epoch with, for "oversample"; they sum to 1.

        For `torch.utils.data.WeightedRandomSampler(attention.draw_weights(), len(train_set))`. None
        before the first mining, when every sample is to be drawn once, and for other ways to attend.

        Args:
            ids: of the samples to draw from, in their order; by default all, in the order of the data
                set that was given to the Attention.

        Raises:
            FastpieError: for an id that is not in the data set.
        """
        if self.attend != "oversample" or not self.epochs:
            return None
        if ids is None:
            weights = np.empty(len(self._plan))
            weights[self._plan.order] = self._attended.weights
        else:
            weights = self._attended.weights[self._plan.find(ids)]
        weights /= weights.sum()
        return weights

    def table(self) -> pa.Table:
        """One row a sample, in sample_id order.

        Columns: `sample_id`; `score`, the last g, and `rank` of it; `attention`, S; `hard`, whether it is
        an HTL; `doubtful`, whether its label is left out; `weight`, with "oversample" that of drawing.
        Null where there never was a score. `hard` goes into `fastpie.analysis.subgroups` beside a
        manifest in the same order: odds ratios of HTL by attribute.

        Raises:
            FastpieError: before the first mining.
        """
        if not self.epochs:
            raise FastpieError(
                f"Expected an epoch that was mined, but there is none yet: the first is {self._warmup - 1}."
            )
        columns = {
            "sample_id": self._plan.sample_ids.array,
            **{
                name: pa.array(getattr(self._attended, name), from_pandas=True)
                for name in ("score", "rank", "attention")
            },
            "hard": self._attended.hard,
            "doubtful": self._attended.in_doubt,
            "weight": self._attended.weights,
        }
        return pa.table(columns).replace_schema_metadata({"score": self._scoring.name})

    @property
    def errors(self) -> pa.Table:
        """Samples that could not be read or scored after some epoch, see `Recorder.errors`."""
        return self._rescan.error_table()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that was mined: tensors, numbers and text (`torch.load(weights_only=True)`)."""
        return {
            "format": _FORMAT,
            "config": copy.deepcopy(self._config),
            "epochs": list(self.epochs),
            "plan": copy.deepcopy(self._rescan.follower.plan),
            "errors": self._rescan.error_state(),
            **self._attended.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        How to attend (`attend`, `strength`, `fraction`, `doubtful`) and when to mine may be other than
        they were.

        Raises:
            FastpieError: if the state is of another data set, score or model.
        """
        check_state("an Attention", _FORMAT, state, self._config)
        self.epochs = list(state["epochs"])
        self._rescan.follower.take_plan(copy.deepcopy(state["plan"]))
        self._rescan.load_error_state(state["errors"])
        self._attended.load(state, mined=bool(self.epochs))


def _recalibrated_from(samples: int) -> int:
    """An eighth, which costs a small data set as little as the rest of a mining."""
    return min(512, max(128, samples // 8))


def _listed(ids: Sequence[Any] | Tensor) -> Sequence[Any]:
    return ids.tolist() if isinstance(ids, Tensor) else ids
