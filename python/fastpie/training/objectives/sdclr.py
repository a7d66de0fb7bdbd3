"""`SDCLR`: self-damaging contrastive learning, two branches in one graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpie.dual.features import PENULTIMATE, features_of, watched
from fastpie.errors import FastpieError
from fastpie.pruning import prune
from fastpie.pruning.masks import Masks
from fastpie.training.objectives.branches import TrainedBranches
from fastpie.training.objectives.contrastive import nt_xent
from fastpie.training.objectives.objective import Objective, TrainBatch, entry_of

__all__ = ["SDCLR", "projection_head"]

_BACKBONE = "backbone."
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SDCLR(Objective):
    """Self-damaging contrastive learning (Jiang et al., ICML 2021, arXiv 2106.02990).

    The first view of an image goes through the dense network, the second through its pruned self;
    both embeddings meet in NT-Xent. What the pruned network forgets has the larger loss, so training
    turns to rare and atypical samples without any label. As in the published code
    (VITA-Group/SDCLR), the mask lies over all convolutions of the backbone, stem included, and is
    chosen anew at the start of every epoch from the full weights; the projection head is dense and
    shared; each branch has its own BatchNorm, statistics and (`own_affine`) weights; a masked weight
    gets its gradient from the dense branch alone.

    The published step runs three forward and two backward passes, since a module under
    DistributedDataParallel may not run twice before a backward pass. Here both branches are one
    graph, with one forward and one backward pass each, and the same gradient. What differs:

    * the published step updates the running statistics of the pruned branch twice with the same
      batch, as one update of momentum ``1 - (1 - m)^2`` does. Training does not read them.
    * with dropout its two pruned passes differ, so that its two losses do.
    * exactly `round(sparsity * n)` weights go, there all below the magnitude of rank
      `ceil(sparsity * n)`.
    * on the CPU sparse kernels may compute layers of the pruned branch, by shape and density.

    The loss's negatives come from all processes (see `nt_xent`). BatchNorm normalises the samples of
    a process; for the whole batch, as published, convert the finished objective by
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.

    Example::

        sdclr = SDCLR(backbone)  # a network with a last linear layer
        views = TwoViews(dataset, augment)
        ...  # train it as any `Objective`, by all of sdclr.parameters()

    The backbone, `model`, keeps the trained weights and the BatchNorm of the dense branch, as the
    published evaluation takes them: replace its last layer and fine-tune it by `Supervised`, or
    freeze all else and keep it in eval mode to probe it. Which samples the pruned network embeds
    otherwise (`drift`) is mined before that::

        dual = fastpie.DualModel(sdclr.model, sdclr.masks, features=sdclr.features)
        fastpie.mine(dual, dataset, out="run/", task="embedding")

    Checkpointing of activations inside the backbone is not possible: it would run the pruned branch
    again without its masks. A last layer behind the features gets no gradient:
    DistributedDataParallel needs ``find_unused_parameters=True`` then (`has_unused_parameters`), and
    torch.compile makes its gradient zero instead of None, so that weight decay moves it.

    Attributes:
        features: the backbone's features by name, or None for its output.
        has_unused_parameters: whether parts of the backbone may get no gradient.
        temperature: of NT-Xent.
        sparsity: of the pruned branch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        sparsity: float = 0.9,
        temperature: float = 0.2,
        features: str | None = PENULTIMATE,
        projection: nn.Module | Sequence[int] | None = None,
        width: int | None = None,
        method: str = "l1",
        scope: str = "global",
        modules: tuple[type[nn.Module], ...] = _CONVOLUTIONS,
        exclude: Iterable[str] = (),
        seed: int = 0,
        own_affine: bool = True,
        sparse_kernels: bool = True,
    ) -> None:
        """Put a projection head and the pruned branch beside a backbone, which is left as it was.

        Args:
            backbone: the network to be trained.
            sparsity: of the pruned branch, in [0, 1); .9 on CIFAR, .3 on ImageNet-100-LT.
            temperature: see `nt_xent`.
            features: what the head projects: "penultimate" for what goes into the last linear layer,
                which is left out, or another name that `DualModel(features=...)` takes, [n, width];
                None for what the backbone returns.
            projection: the head, a module from [n, width] to [n, d]; or the widths of its layers
                (see `projection_head`); None for the published ones, (width, width, 128).
            width: columns of the features; needed where they are not penultimate and the head is no
                module.
            method: see `fastpie.prune`, as the following. "random" is the control.
            scope: "global" as published.
            modules: which layers' weights are pruned.
            exclude: names of modules of the backbone that are not pruned.
            seed: of "random"; each epoch draws anew from it.
            own_affine: whether the pruned branch has its own weights and biases of BatchNorm.
            sparse_kernels: whether sparse kernels may compute the pruned branch.

        Raises:
            FastpieError: for a bad option, a backbone without convolutions, or without such features.
        """
        super().__init__()
        if not temperature > 0:
            raise FastpieError(f"Expected `temperature` to be above 0, but got {temperature!r}.")
        self.sparsity = sparsity
        self.temperature = temperature
        self._prune = {
            "method": method, "scope": scope, "modules": modules,
            "exclude": [exclude] if isinstance(exclude, str) else list(exclude),
        }  # fmt: skip
        self._seed = seed
        masks = self._choose_masks(backbone, 0)
        self.features = None if features is None else features_of(backbone, features)
        self.has_unused_parameters = features is not None
        if not isinstance(projection, nn.Module):
            width = _width(backbone, features, self.features) if width is None else width
            projection = projection_head(width, projection or (width, width, 128))
            some = next(backbone.parameters())
            projection.to(some.device, some.dtype)
        embedder = _Embedder(backbone, projection, self.features)
        self.dual = TrainedBranches(
            embedder,
            _named_within(embedder, masks),
            own_affine=own_affine,
            sparse_kernels=sparse_kernels,
        )
        # In state_dict: training that is taken up inside an epoch keeps that epoch's masks.
        self.register_buffer("masks_epoch", torch.tensor(-1))
        self.masks_epoch: Tensor
        self.training = backbone.training

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The backbone, trained; its BatchNorm is that of the dense branch."""
        return self.dual.model.backbone  # type: ignore[return-value]

    @property
    def projection(self) -> nn.Module:
        """The projection head."""
        return self.dual.model.projection  # type: ignore[return-value]

    @property
    def masks(self) -> Masks:
        """The masks in force, of the backbone."""
        masks = self.dual.masks
        return Masks(
            {name.removeprefix(_BACKBONE): level for name, level in masks.levels.items()},
            masks.sparsities,
            is_ladder=False,
            fingerprint=Masks.fingerprint_of(self.model),
            info=masks.info,
        )

    def forward(self, batch: TrainBatch) -> Tensor:  # [n]
        """NT-Xent of each sample.

        Args:
            batch: `images` is (view 1, view 2), of the dense and of the pruned branch.

        Raises:
            FastpieError: if there are not two views.
        """
        views = batch.images
        if not isinstance(views, tuple | list) or len(views) != 2:
            found = len(views) if isinstance(views, tuple | list) else type(views).__name__
            raise FastpieError(
                f"Expected `batch.images` to be two views (see TwoViews), but got {found}."
            )
        out = self.dual.pair(*views)
        return nt_xent(out.dense, out.pruned, self.temperature)

    def begin_epoch(self, epoch: int) -> None:
        """Choose the masks anew from the weights as they are.

        An epoch that has begun already keeps its masks: a training that is taken up in its middle.
        """
        if epoch == int(self.masks_epoch):
            return
        self.dual.masks = _named_within(self.dual.model, self._choose_masks(self.model, epoch))
        self.masks_epoch.fill_(epoch)

    def _choose_masks(self, backbone: nn.Module, epoch: int) -> Masks:
        seed = self._seed + epoch if self._prune["method"] == "random" else None
        return prune(backbone, float(self.sparsity), seed=seed, **self._prune)  # type: ignore[arg-type]


def projection_head(width: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with BatchNorm behind each and ReLU between, as published in SDCLR.

    Args:
        width: of the features.
        widths: of what each layer gives; (width, width, 128) is the published head.

    Raises:
        FastpieError: for widths below 1, or none.
    """
    sizes = [width, *widths]
    if len(sizes) < 2 or min(sizes) < 1:
        raise FastpieError(f"Expected widths of at least 1 of one layer or more, but got {sizes}.")
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
        if i:
            layers.append(nn.ReLU(inplace=True))
        # A bias in front of BatchNorm does nothing; the first has one as published.
        layers += [nn.Linear(before, after, bias=i == 0), nn.BatchNorm1d(after)]
    return nn.Sequential(*layers)


class _Embedder(nn.Module):
    """A backbone's features, projected."""

    def __init__(self, backbone: nn.Module, projection: nn.Module, features: str | None) -> None:
        """Join them."""
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self._features = features

    def forward(self, *args: Any) -> Tensor:  # [n, d]
        """The projections of a batch."""
        if self._features is None:
            found = entry_of(self.backbone(*args), None)
        else:
            with watched(self.backbone, self._features) as seen:
                self.backbone(*args)
            if len(seen) != 1:
                raise FastpieError(
                    f"Expected the features {self._features!r} once in a forward pass, but got them "
                    f"{len(seen)} times."
                )
            found = entry_of(seen[0], None)
        if found.ndim != 2:
            raise FastpieError(
                f"Expected features [n, width], but got {list(found.shape)}; a name with ':pooled' "
                "behind it takes mean and standard deviation of each channel."
            )
        return self.projection(found)  # type: ignore[no-any-return]


def _width(backbone: nn.Module, given: str | None, features: str | None) -> int:
    if given != PENULTIMATE or features is None or not features.endswith(":input"):
        raise FastpieError(
            "Expected `width`, the number of columns of the features, or a module as `projection`, "
            "where the features are not 'penultimate'."
        )
    layer = backbone.get_submodule(features.removesuffix(":input"))
    return int(layer.in_features)  # type: ignore[arg-type]


def _named_within(embedder: nn.Module, masks: Masks) -> Masks:
    """The backbone's masks as those of backbone and head together."""
    return Masks(
        {_BACKBONE + name: level for name, level in masks.levels.items()},
        masks.sparsities,
        is_ladder=False,
        fingerprint=Masks.fingerprint_of(embedder),
        info=masks.info,
    )
