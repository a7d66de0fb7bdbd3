"""What only a GPU shows of training: run by `make gpu-check`."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import fastpie
from fastpie.training import (
    SDCLR,
    Attention,
    Consistency,
    MaskedTraining,
    MeanTeacher,
    Supervised,
    Trainer,
    TwoViews,
    criterion,
)

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


class _Stripes(Dataset):
    """Images of two classes, told apart by the direction of their stripes."""

    def __init__(self, count=96):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 2, (count,), generator=generator)
        wave = torch.sin(torch.arange(16) * 1.5).expand(1, 16, 16)
        noise = 0.3 * torch.randn(count, 1, 16, 16, generator=generator)
        self.images = torch.stack([wave if y else wave.mT for y in self.labels]) + noise
        self.sample_ids = [f"s{i:03d}" for i in range(count)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index]), self.sample_ids[index]


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip


def _fit(objective, **options):
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = options.pop("optimizer", None) or torch.optim.AdamW(parameters, 0.003)
    data = options.pop("data", None) or _Stripes()
    epochs = options.pop("epochs", 6)
    return Trainer(
        objective,
        data,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=32,
        progress=False,
        **options,
    ).fit()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("attend", ["soft", "oversample"])
def test_attention_trains(precision, attend):
    data, model = _Stripes(), _network().cuda()
    attention = Attention(model, data, warmup=2, every=2, attend=attend, batch_size=32)
    result = _fit(
        Supervised(model, criterion("cross_entropy")), data=data, attention=attention,
        precision=precision, valid=data,
    )  # fmt: skip
    assert attention.epochs == [1, 3, 5]
    assert attention.table()["attention"].null_count == 0
    assert result.history[-1]["valid_accuracy"] > 0.9
    assert result.history[-1]["gpu_memory_gib"] > 0


def test_a_training_goes_on(tmp_path):
    def train(epochs):
        model = _network().cuda()
        attention = Attention(model, _Stripes(), warmup=1, every=1, batch_size=32)
        objective = Supervised(model, criterion("cross_entropy"))
        _fit(objective, attention=attention, epochs=epochs, out=tmp_path / "run", log="csv")
        return model.state_dict()

    whole = _network().cuda()
    attention = Attention(whole, _Stripes(), warmup=1, every=1, batch_size=32)
    _fit(Supervised(whole, criterion("cross_entropy")), attention=attention, epochs=4)
    train(2)
    for name, value in train(4).items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_a_compiled_model_trains():
    model = _network().cuda()
    result = _fit(Supervised(model, criterion("cross_entropy")), compile=True, valid=_Stripes())
    assert result.history[-1]["valid_accuracy"] > 0.9


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"capturable": True}])
def test_removed_weights_stay_zero(options):
    model = _network().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 0.003, weight_decay=0.1, **options)
    masked = MaskedTraining(model, fastpie.prune(model, 0.8), optimizer)
    _fit(Supervised(model, criterion("cross_entropy")), optimizer=optimizer, masked=masked)
    weights = dict(model.named_parameters())
    for name, mask in masked.masks.items():
        removed = ~mask.cuda()
        assert (weights[name][removed] == 0).all()
        state = optimizer.state[weights[name]]
        assert (state["exp_avg"][removed] == 0).all()
        assert (state["exp_avg_sq"][removed] == 0).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sdclr_is_what_it_is_on_the_cpu(precision):
    views = TwoViews(_Stripes(64), lambda image: image + 0.1 * torch.randn_like(image))
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        objective = SDCLR(_network(), sparsity=0.5).to(device)
        result = _fit(objective, data=views, epochs=2, precision=precision)
        losses[device] = result.history[-1]["loss"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)


def test_consistency_and_a_teacher_on_the_gpu():
    data = _Stripes()
    model = _network().cuda()
    attention = Attention(model, data, warmup=1, every=2, attend="consistency", batch_size=32)
    result = _fit(Consistency(model, criterion("cross_entropy")), attention=attention, valid=data)
    assert result.history[-1]["valid_accuracy"] > 0.9
    few = copy.deepcopy(data)
    few.labels[::2] = -1
    student = _network().cuda()
    result = _fit(MeanTeacher(student, criterion("cross_entropy")), data=few, valid=data)
    assert result.history[-1]["valid_accuracy"] > 0.9
