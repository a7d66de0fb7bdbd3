"""`fastpie.Masks`: a mapping, its levels, the model it belongs to, its files."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from torch import nn

import fastpie
from fastpie import FastpieError, Masks
from networks import SMALL, Network, PlainCNN, TiedWeights, random_masks


def ladder(levels: int) -> list[float]:
    return [(i + 1) / (levels + 1) for i in range(levels)]


def test_masks_are_a_mapping_by_parameter_name_of_the_highest_level() -> None:
    model = PlainCNN()
    masks = fastpie.prune(model, [0.2, 0.8])
    assert list(masks) == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert len(masks) == 3
    assert "conv1.weight" in masks
    assert "conv1.bias" not in masks
    with pytest.raises(KeyError):
        masks["conv1.bias"]
    highest = masks.at(0.8)
    for name, mask in masks.items():
        assert mask.dtype is torch.bool
        assert mask.device.type == "cpu"
        assert torch.equal(mask, highest[name])
    assert masks.total == sum(mask.numel() for mask in masks.values())


def test_changing_a_mask_that_was_given_out_changes_nothing() -> None:
    masks = fastpie.prune(PlainCNN(), 0.5)
    before = copy.deepcopy(masks)
    masks["conv1.weight"].fill_(False)
    assert masks == before


def test_at_finds_a_level_within_1e_9_and_no_other() -> None:
    masks = fastpie.prune(PlainCNN(), [0.1, 0.2, 0.3])
    for near in (0.3, 0.1 + 0.2, 0.3 + 5e-10, 0.3 - 5e-10):
        level = masks.at(near)
        assert not level.is_ladder
        assert level.sparsities == [0.3]
    for far in (0.3 + 1e-8, 0.25, 0.0, 1.0, float("nan")):
        with pytest.raises(FastpieError, match="levels"):
            masks.at(far)


def test_removed_counts_the_weights_of_each_level() -> None:
    model = PlainCNN()
    masks = fastpie.prune(model, [0.2, 0.8])
    for sparsity, counts in zip(masks.sparsities, masks.removed(), strict=True):
        assert sum(counts.values()) == round(sparsity * masks.total)
        for name, count in counts.items():
            assert count == int((~masks.at(sparsity)[name]).sum())


def test_equality_looks_at_weights_levels_and_model() -> None:
    model = PlainCNN()
    masks = fastpie.prune(model, 0.5)
    assert masks == fastpie.prune(model, 0.5)
    assert masks == copy.deepcopy(masks)
    assert masks != fastpie.prune(model, [0.5])
    assert masks != fastpie.prune(model, 0.6)
    assert masks != fastpie.prune(model, 0.5, scope="layer")
    assert masks != fastpie.prune(model, 0.5, exclude=["fc"])
    assert masks != dict(masks)
    with pytest.raises(TypeError):
        hash(masks)


def test_repr_tells_levels_and_size() -> None:
    text = repr(fastpie.prune(PlainCNN(), [0.25, 0.5]))
    assert "0.25" in text
    assert "3 parameters" in text


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("levels", range(1, 21))
def test_save_and_load_give_the_same_masks(levels: int, tmp_path: Path) -> None:
    model = PlainCNN()
    masks = fastpie.prune(model, ladder(levels), method="random", seed=levels)
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(str(tmp_path / "masks.safetensors"))
    assert loaded == masks
    assert loaded.info == masks.info
    assert (loaded.sparsities, loaded.is_ladder) == (masks.sparsities, True)
    for sparsity in masks.sparsities:
        assert loaded.at(sparsity) == masks.at(sparsity)
    loaded.check_model(model)


@pytest.mark.parametrize("network", SMALL, ids=lambda n: n.name)
def test_masks_of_every_network_survive_a_file(network: Network, tmp_path: Path) -> None:
    masks = fastpie.prune(network.build(), 0.5)
    masks.save(tmp_path / "m")
    assert Masks.load(tmp_path / "m") == masks
    assert not Masks.load(tmp_path / "m").is_ladder


@pytest.mark.parametrize("levels", [1, 3, 4, 15, 20, 255])
def test_file_takes_the_bits_that_the_levels_need_and_no_more(levels: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(400, 100), nn.Linear(100, 8))
    fastpie.prune(model, ladder(levels)).save(tmp_path / "m")
    bits = math.ceil(math.log2(levels + 1))
    payload = bits * 40_800 / 8
    assert payload <= (tmp_path / "m").stat().st_size <= payload + 2000 + 25 * levels


def test_saving_replaces_the_old_file_and_leaves_no_other_behind(tmp_path: Path) -> None:
    model = PlainCNN()
    path = tmp_path / "m"
    fastpie.prune(model, [0.1, 0.9]).save(path)
    fastpie.prune(model, 0.5).save(path)
    assert Masks.load(path) == fastpie.prune(model, 0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def rewrite(path: Path, change: Callable[[dict, dict, dict], None]) -> None:
    """Save the file again after change(planes, metadata, header)."""
    from safetensors import safe_open

    planes = load_file(path)
    with safe_open(path, framework="np") as file:
        metadata = dict(file.metadata())
    header = json.loads(metadata["header"])
    change(planes, metadata, header)
    if "header" in metadata and metadata["header"] != "not json":
        metadata["header"] = json.dumps(header)
    save_file(planes, path, metadata=metadata)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated_header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "truncated_data": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "text": lambda path: path.write_text("masks"),
    "huge_header": lambda path: path.write_bytes(b"\xff" * 64),
    "other_format": lambda path: rewrite(path, lambda p, m, h: h.update(format="x")),
    "no_format": lambda path: rewrite(path, lambda p, m, h: h.pop("format")),
    "no_header": lambda path: rewrite(path, lambda p, m, h: m.pop("header")),
    "header_no_json": lambda path: rewrite(path, lambda p, m, h: m.update(header="not json")),
    "no_shapes": lambda path: rewrite(path, lambda p, m, h: h.pop("shapes")),
    "shapes_a_list": lambda path: rewrite(path, lambda p, m, h: h.update(shapes=[1])),
    "wrong_shape": lambda path: rewrite(path, lambda p, m, h: h["shapes"].update({"fc.weight": [9, 99]})),
    "missing_tensor": lambda path: rewrite(path, lambda p, m, h: p.pop("fc.weight")),
    "other_dtype": lambda path: rewrite(
        path, lambda p, m, h: p.update({"fc.weight": p["fc.weight"].astype(np.float32)})
    ),
    "no_levels": lambda path: rewrite(path, lambda p, m, h: h.update(sparsities=[])),
    "falling_levels": lambda path: rewrite(path, lambda p, m, h: h.update(sparsities=[0.9, 0.1])),
    "level_above_one": lambda path: rewrite(path, lambda p, m, h: h.update(sparsities=[0.1, 1.7])),
    "levels_no_numbers": lambda path: rewrite(path, lambda p, m, h: h.update(sparsities=["a", "b"])),
    "checkpoint": lambda path: save_torch_file({"w": torch.zeros(3)}, path),
    "bf16_checkpoint": lambda path: save_torch_file({"w": torch.zeros(3).bfloat16()}, path),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_and_foreign_files_are_refused_with_their_path(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "masks.safetensors"
    fastpie.prune(PlainCNN(), [0.1, 0.9]).save(path)
    damage(path)
    with pytest.raises(FastpieError, match=r"masks\.safetensors"):
        Masks.load(path)


def test_a_folder_is_no_masks_file(tmp_path: Path) -> None:
    with pytest.raises(FastpieError, match="masks"):
        Masks.load(tmp_path)


# ---------------------------------------------------------------------------- the model


def test_other_weights_of_the_same_model_are_accepted() -> None:
    masks = fastpie.prune(PlainCNN(), 0.5)
    other = PlainCNN()
    masks.check_model(other)
    masks.apply_(other)
    for name, mask in masks.items():
        parameter = other.get_parameter(name)
        assert not parameter[~mask].any()
        assert parameter[mask].abs().min() > 0


def changed(change: Callable[[PlainCNN], object]) -> PlainCNN:
    model = PlainCNN()
    change(model)
    return model


OTHERS = {
    "another_architecture": lambda: TiedWeights(),
    "other_shape": lambda: changed(lambda m: setattr(m, "fc", nn.Linear(8, 7))),
    "other_name": lambda: changed(lambda m: m._modules.update(head=m._modules.pop("fc"))),
    "one_more_parameter": lambda: changed(lambda m: setattr(m, "extra", nn.Linear(2, 2))),
    "no_bias": lambda: changed(lambda m: setattr(m, "fc", nn.Linear(8, 5, bias=False))),
    "same_names_other_shape_of_a_bias": lambda: changed(
        lambda m: setattr(m.fc, "bias", nn.Parameter(torch.zeros(1)))
    ),
}


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS.keys())
def test_masks_of_another_model_are_refused(build: Callable[[], nn.Module]) -> None:
    masks = fastpie.prune(PlainCNN(), 0.5)
    for use in (masks.check_model, masks.apply_):
        with pytest.raises(FastpieError, match="made for"):
            use(build())


def test_masks_from_tensors_hold_what_they_were_given() -> None:
    model = PlainCNN()
    given = random_masks(model)
    masks = Masks.from_tensors(given, model)
    assert set(masks) == set(given)
    assert all(torch.equal(masks[name], mask) for name, mask in given.items())
    kept = sum(int(mask.sum()) for mask in given.values())
    assert masks.sparsities == [pytest.approx(1 - kept / masks.total)]
    assert not masks.is_ladder


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "at least one"),
        ({"fc.nothing": torch.ones(5, 8, dtype=torch.bool)}, "fc.nothing"),
        ({"fc.weight": torch.ones(5, 8)}, "float32"),
        ({"fc.weight": torch.ones(8, 5, dtype=torch.bool)}, r"\[5, 8\].*\[8, 5\]"),
    ],
    ids=["none", "unknown", "float", "shape"],
)
def test_tensors_that_are_no_masks_of_the_model_are_refused(tensors: dict, message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        Masks.from_tensors(tensors, PlainCNN())


def test_two_masks_for_one_tied_weight_are_refused() -> None:
    masks = {f"{name}.weight": torch.rand(6, 6) > 0.5 for name in ("first", "second")}
    with pytest.raises(FastpieError, match="weight"):
        Masks.from_tensors(masks, TiedWeights())
