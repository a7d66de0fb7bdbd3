"""`Follower`: a private copy of a model in training, pruned anew whenever the weights have changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpie.dual import DualEngine, DualModel, stage_features
from fastpie.dual.calibration import statistics_of
from fastpie.errors import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.pruning import Masks, prune
from fastpie.pruning.prunable import prunable_weights
from fastpie.pruning.prune import METHODS
from fastpie.pruning.structured import pattern_of

__all__ = ["Follower", "rule_of", "trained", "usable_device"]


class Follower:
    """The dual model of a model in training, and its engine, apart from the training.

    Attributes:
        model: that is trained, out of its wrappers.
        device: where it is mined.
        dual: over a copy of the model, in eval mode.
        plan: of the engine, None until there is one; kernels are chosen by timing, so what goes on
            from a state must be told it (`take_plan`) to choose alike.
    """

    def __init__(
        self,
        model: nn.Module | DualModel,
        device: str | torch.device | None,
        sparsity: float | Sequence[float],
        *,
        features: bool,
        precision: str,
        backend: str,
    ) -> None:
        """Copy the model; see `Recorder`.

        Args:
            model: in wrappers or not.
            device: by default where the model is.
            sparsity: for a model that is no DualModel.
            features: whether to give those that a DualModel names.
            precision: of the engine.
            backend: of the engine.

        Raises:
            FastpieError: for a model that cannot be copied, masks that `prune` did not choose, or a
                device that torch cannot use.
        """
        self.model, masks, named = trained(model, sparsity)
        self._rule = rule_of(masks, self.model)
        self._options = {"precision": precision, "backend": backend}
        self._engine: DualEngine | None = None
        self.plan: dict[str, Any] | None = None
        self.device = usable_device(device, self.model)
        self._given = device is not None
        private = _private(self.model, self.device)
        self.dual = DualModel(private, masks, named if features else None).eval()
        self._alone: DualModel | None = None

    def leave_out_dense(self) -> None:
        """Let the engine run the pruned model alone, which then is both of its outputs.

        Half the work where no more is wanted: an engine runs models that are the same once. For
        masks of one level; features are not given.
        """
        plain = copy.deepcopy(self.dual.model)
        everything = prune(
            plain, 0.0, **{**self._rule, "method": "l1"}
        )  # no pattern removes nothing
        self._alone = DualModel(plain, everything).eval()
        self._engine = None

    def watch_stages(self, example: tuple[Any, ...]) -> None:
        """Give the features of the early stages from now on."""
        self.dual.feature_module = stage_features(self.dual.model, example)
        self._engine = None

    def follow(self, ranks: Ranks, batches: Callable[[], Iterable[Any]]) -> None:
        """Be what the model is now on rank 0, with masks and BatchNorm statistics made anew.

        Args:
            ranks: the processes of the training.
            batches: gives those to recalibrate from; called on rank 0 and where there is BatchNorm.

        Raises:
            FastpieError: for weights that are not finite, or a model of other parameters than before.
        """

        def prepare() -> dict[str, Tensor]:
            levels = self.dual.sparsities
            sparsity = levels if self.dual.is_ladder else levels[0]
            self.dual.masks = prune(self.dual.model, sparsity, **self._rule)
            dense = statistics_of(self.dual.model)
            for level in range(len(levels)):
                _copy(dense, self.dual.statistics(level))
            if dense:
                self.dual.recalibrate(batches())
            return {k: v.cpu() for k, v in _tensors(self.dual).items()} if ranks.count > 1 else {}

        self._check_device()
        live, own = _tensors(self.model), _tensors(self.dual.model)
        if {k: v.shape for k, v in live.items()} != {k: v.shape for k, v in own.items()}:
            raise FastpieError(
                "Expected the parameters and buffers that the model had at the beginning, "
                f"but those of {type(self.model).__name__} have other names or shapes now."
            )
        _copy(live, own)
        # BatchNorm statistics of DDP differ from rank to rank.
        _copy(ranks.first(prepare), _tensors(self.dual))

    def refresh(self, ranks: Ranks, example: tuple[Any, ...]) -> DualEngine:
        """The engine of `dual` as it is now, with the kernels that rank 0 has chosen.

        Compiled the first time, refreshed after that.

        Args:
            ranks: the processes of the training.
            example: a batch, as the model's positional arguments.
        """

        def chosen() -> dict[str, Any]:
            if self._engine is None:
                self._engine = self._compile(example)
            return self._engine.plan

        if self._alone is not None:
            self._harden(self._alone)
        if self._engine is not None:
            self._engine.refresh()
        self.plan = ranks.first(chosen)
        if self._engine is None or self._engine.plan != self.plan:
            self._engine = self._compile(example)
        return self._engine

    def take_plan(self, plan: dict[str, Any] | None) -> None:
        """Choose kernels as an earlier engine did."""
        self.plan, self._engine = plan, None

    def _check_device(self) -> None:
        """Warn once of a model that was moved to a GPU after it was copied."""
        now = next(self.model.parameters()).device
        if not self._given and now.type != self.device.type:
            warnings.warn(
                f"The model is on {now} now, but was on {self.device} when it was given to be mined, and "
                "is mined there. Move it before, or say with `device` where to mine.",
                stacklevel=5,
            )
            self._given = True

    def _compile(self, example: tuple[Any, ...]) -> DualEngine:
        dual = self._alone or self.dual
        return dual.compile(example, plan=self.plan, **self._options)

    def _harden(self, alone: DualModel) -> None:
        """Make the pruned model's weights and statistics those of a plain model."""
        own = _tensors(alone.model)
        _copy(_tensors(self.dual.model), own)
        pruned = self.dual.pruned_state(0)  # by every place of a shared weight
        _copy({name: pruned[name] for name in pruned.keys() & own.keys()}, own)
        _copy(statistics_of(alone.model), alone.statistics(0))


def trained(
    model: nn.Module | DualModel, sparsity: float | Sequence[float]
) -> tuple[nn.Module, Masks, str | None]:
    """The module that is trained, unwrapped, masks that tell how to prune it, and named features.

    Args:
        model: in DistributedDataParallel or torch.compile or not; a DualModel has masks of its own.
        sparsity: of the masks for another model.
    """
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif isinstance(inner, nn.Module) and hasattr(inner, "_orig_mod"):  # of torch.compile
            inner = inner._orig_mod
        else:
            break
    if isinstance(inner, DualModel):
        return inner.model, inner.masks, inner.feature_module
    return inner, prune(inner, sparsity), None


def rule_of(masks: Masks, model: nn.Module) -> dict[str, Any]:
    """The arguments of `prune` that choose masks of the same parameters again.

    Raises:
        FastpieError: for masks that `prune` has not chosen.
    """
    names = ("method", "scope", "seed", "norm")
    rule: dict[str, Any] = {key: masks.info[key] for key in names if key in masks.info}
    method = str(rule.get("method"))
    if method not in METHODS and pattern_of(method) is None:
        raise FastpieError(
            "Expected masks of fastpie.prune, which can be chosen again from the weights of a later "
            f"epoch, but got masks made otherwise (method {method!r})."
        )
    holders = {
        type(module)
        for prefix, module in model.named_modules()
        if (f"{prefix}.weight" if prefix else "weight") in masks
    }
    rule["modules"] = tuple(holders)
    prunable = prunable_weights(model, modules=rule["modules"])
    rule["exclude"] = [name for name in prunable if name not in masks]
    if prunable.keys() - rule["exclude"] != masks.keys():
        raise FastpieError(
            f"Expected masks of weights that `prune` finds in {type(model).__name__}, but some are "
            "not among them."
        )
    return rule


def usable_device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    """A device, or where the model is; a GPU with its number.

    Raises:
        FastpieError: for one that torch cannot use.
    """
    try:
        return torch.empty(0, device=device or next(model.parameters()).device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise FastpieError(
            f"Expected a device that torch can use, but got {device!r}: {error}"
        ) from error


def _private(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise FastpieError(
            f"Expected a model that copy.deepcopy can copy, but {type(model).__name__} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    return copied.to(device).requires_grad_(False)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not saved included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
