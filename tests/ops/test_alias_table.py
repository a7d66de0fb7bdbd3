"""`alias_table`: what is drawn from a table is what its weights say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpie import FastpieError, ops
from fastpie.ops import reference


def drawn(table: tuple[Tensor, Tensor]) -> np.ndarray:
    """The probability of each entry that a table implies, in extended precision."""
    probability = table[0].numpy().astype(np.longdouble)
    alias = table[1].numpy()
    by_donor = np.argsort(alias, kind="stable")
    donors, starts = np.unique(alias[by_donor], return_index=True)
    mass = probability.copy()
    mass[donors] += np.add.reduceat((1 - probability)[by_donor], starts)
    return mass / len(mass)


def wanted(weights: Tensor) -> np.ndarray:
    scaled = weights.numpy().astype(np.longdouble) / np.longdouble(weights.max().item())
    return scaled / scaled.sum()


def check(weights: Tensor) -> None:
    probability, alias = ops.alias_table(weights)
    assert probability.dtype is torch.float64
    assert alias.dtype is torch.int64
    assert probability.shape == alias.shape == weights.shape
    assert float(probability.min()) >= 0
    assert float(probability.max()) <= 1
    assert int(alias.min()) >= 0
    assert int(alias.max()) < len(weights)
    assert (weights[alias[probability < 1]] > 0).all()  # no one falls back on an entry of weight 0
    assert (probability[weights == 0] == 0).all()
    whole = probability == 1
    assert torch.equal(alias[whole], torch.arange(len(weights))[whole])
    have, want = drawn((probability, alias)), wanted(weights)
    assert np.abs(have - want).max() <= 1e-15
    # Relatively too, but for what is so small that fp64 holds it with fewer digits.
    large = want > 1e-290
    assert (np.abs(have - want)[large] <= 1e-12 * want[large]).all()


def fp64(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


WEIGHTS = {
    "one": fp64([3.0]),
    "equal": torch.full((1001,), 0.1, dtype=torch.float64),
    "equal thirds": torch.full((3,), 1 / 3, dtype=torch.float64),
    "one above the rest": torch.cat([torch.ones(99_999), torch.tensor([2.0])]).double(),
    "one below the rest": torch.cat([torch.ones(99_999), torch.tensor([0.5])]).double(),
    "all on one": fp64([0, 0, 5, 0]),
    "subnormal": fp64([5e-324, 1e-323, 0, 5e-324]),
    "huge": fp64([1.7e308, 1.7e308, 1e308, 0]),
    "huge and subnormal": fp64([1.7e308, 5e-324, 1e300]),
    "two classes": torch.where(torch.arange(100_000) % 7 < 2, 1 / 3, 7.1).double(),
    "ranks": 1 + 4 * torch.linspace(1, 0, 50_000, dtype=torch.float64),
    "a few carry all": fp64(np.random.default_rng(0).lognormal(0, 20, 100_000)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_tables_draw_by_the_weights(name: str) -> None:
    check(WEIGHTS[name])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 1 / 3]) | st.floats(0, 1e308), min_size=1, max_size=50)
    .filter(any)
)  # fmt: skip
def test_any_weights(values: list[float]) -> None:
    check(fp64(values))


def test_more_entries_than_torch_multinomial_takes() -> None:
    count = 2**24 + 5
    weights = 1 + 4 * torch.linspace(0, 1, count, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="2\\^24"):
        torch.multinomial(weights, 1)
    probability, alias = (table.numpy() for table in ops.alias_table(weights))
    # Each donor serves few here: fp64 adds them up without loss, and quickly.
    have = (probability + np.bincount(alias, 1 - probability, minlength=count)) / count
    want = (weights / weights.sum()).numpy()
    assert np.abs(have / want - 1).max() <= 1e-12


@pytest.mark.parametrize("name", ["one", "equal", "all on one", "ranks", "two classes"])
def test_the_twin_draws_the_same(name: str) -> None:
    have = drawn(reference.alias_table(WEIGHTS[name]))
    np.testing.assert_allclose(have, drawn(ops.alias_table(WEIGHTS[name])), rtol=1e-9, atol=1e-18)


def test_strided_weights() -> None:
    weights = torch.rand(50, 3, dtype=torch.float64)[:, 1]
    assert torch.equal(ops.alias_table(weights)[0], ops.alias_table(weights.clone())[0])


def test_operator_passes_torch_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastpie.alias_table.default, (WEIGHTS["two classes"],))


def test_operator_compiles_into_one_graph() -> None:
    compiled = torch.compile(ops.alias_table, backend="aot_eager", fullgraph=True)
    for have, want in zip(
        compiled(WEIGHTS["ranks"]), ops.alias_table(WEIGHTS["ranks"]), strict=True
    ):
        assert torch.equal(have, want)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), "float64"),
        (torch.ones(2, 2, dtype=torch.float64), r"\[2, 2\]"),
        (torch.ones(0, dtype=torch.float64), "at least one weight"),
        (fp64([1, -1e-300]), "finite and at least 0"),
        (fp64([1, float("nan")]), "finite and at least 0"),
        (fp64([1, float("inf")]), "finite and at least 0"),
        (fp64([0, 0]), "above 0"),
    ],
)
def test_bad_weights_are_refused(weights: Tensor, message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        ops.alias_table(weights)
