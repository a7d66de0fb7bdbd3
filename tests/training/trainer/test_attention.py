"""The training loop with the real `Attention`: mined while it trains, stopped and gone on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from fastpie.training.attention import attention
from fastpie.training.objectives.objective import Supervised
from fastpie.training.trainer.trainer import Trainer
from training_runs import check_same, state_of

COUNT = 60


class Images(Dataset[Any]):
    """Three kinds of noise images, augmented or not."""

    sample_ids = tuple(f"case-{i}" for i in range(COUNT))

    def __init__(self, augmented: bool) -> None:
        self.augmented = augmented

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))
        image[:, index % 3] += 1.0
        noise = 0.2 * torch.randn(1, 8, 8) if self.augmented else 0.0
        return image + noise, index % 3, f"case-{index}"


class StoppedError(Exception):
    """A step that fails."""


def trained(
    out: Path | None, attend: str, stop: int = 1000, order: list[int] | None = None
) -> tuple[dict[str, Tensor], Any]:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    model = nn.Sequential(*layers)
    objective = Supervised(model, lambda z, y: F.cross_entropy(z, y, reduction="none"))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    mined = attention.Attention(
        model, Subset(Images(False), order or range(COUNT)), warmup=2, every=2, attend=attend
    )
    steps = iter(range(stop))

    def count(*args: Any) -> None:
        if next(steps, None) is None:
            raise StoppedError

    objective.register_forward_pre_hook(count)
    trainer = Trainer(
        objective, Images(True), optimizer=optimizer, epochs=5, attention=mined, out=out, batch_size=20,
        checkpoint_minutes=0.0, progress=False,
    )  # fmt: skip
    trainer.fit()
    trainer.attention = None  # its state is compared by itself
    return state_of(trainer), mined


@pytest.mark.parametrize("attend", ["soft", "oversample"])
def test_goes_on_with_what_was_mined(tmp_path: Path, attend: str) -> None:
    want, whole = trained(None, attend)
    assert whole.epochs == [1, 3]
    for stop in (5, 6, 10, 14):
        folder = tmp_path / str(stop)
        with pytest.raises(StoppedError):
            trained(folder, attend, stop)
        found, mined = trained(folder, attend)
        check_same(found, want)
        assert mined.epochs == [1, 3]
        ids = list(Images.sample_ids)
        assert torch.equal(mined.weights(ids), whole.weights(ids))
        assert torch.equal(mined.hard(ids), whole.hard(ids))


def test_draws_follow_the_ids_where_the_mined_data_set_is_in_another_order() -> None:
    drawn, _ = trained(None, "oversample")
    shuffled, _ = trained(None, "oversample", order=torch.randperm(COUNT).tolist())
    check_same(shuffled, drawn)


def test_attention_changes_the_training() -> None:
    soft, _ = trained(None, "soft")
    drawn, _ = trained(None, "oversample")
    assert not torch.equal(soft["objective.model.4.weight"], drawn["objective.model.4.weight"])
