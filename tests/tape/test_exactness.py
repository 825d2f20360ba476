"""The tape against a loop over single examples, in float64, on every model of the zoo."""

from functools import lru_cache

import pytest
import torch
from tests.oracles.loop import norms_of, one_example_loop, relative_error
from tests.tape.zoo import ZOO, Case, published
from torch import Tensor

import dptorch
from dptorch.tape import Tape

pytestmark = pytest.mark.usefixtures("float64")


def recorded(case: Case, mode: str = "auto") -> Tape:
    with dptorch.record(case.model, mode=mode) as tape:
        loss = case.loss(case.model, *case.batch).sum()
    loss.backward()
    return tape


_MODES = ("auto", "non-ghost", "BK-ghost", "BK-MixGhostClip")
_CASES = [
    (name, mode)
    for name in ZOO
    # At the image sizes of timm, Gram matrices of early convolutions take minutes.
    for mode in (_MODES[:1] if name.startswith("timm") else _MODES)
]


@lru_cache(maxsize=1)  # the modes of a case come one after another
def looped(name: str) -> tuple[Case, dict[str, Tensor]]:
    """A case and its per-example gradients by the loop."""
    case = ZOO[name]()
    return case, one_example_loop(case.model, case.batch, case.loss)


@pytest.mark.parametrize(
    ("name", "mode"),
    [pytest.param(*case, marks=pytest.mark.zoo if published(case[0]) else ()) for case in _CASES],
)
def test_norms_and_clipped_sums_equal_the_loop(name: str, mode: str) -> None:
    case, expected = looped(name)
    tape = recorded(case, mode)

    norms = norms_of(expected)
    torch.testing.assert_close(tape.norms(), norms, rtol=1e-9, atol=1e-12)
    coefficients = torch.rand(norms.shape[0])
    clipped = tape.clipped_sum(coefficients)
    flat = torch.cat([clipped[k].flatten() for k in expected])
    truth = torch.cat([torch.tensordot(coefficients, g, 1).flatten() for g in expected.values()])
    assert relative_error(flat, truth) <= 1e-9
    formed = tape.per_example_gradients()
    for key, gradient in expected.items():
        assert relative_error(formed[key], gradient) <= 1e-9, key
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("name", ["mlp", "resnet_groupnorm", "gpt2_tied", "vit", "lstm_and_gru"])
def test_a_batch_of_one(name: str) -> None:
    case = ZOO[name]()
    single = Case(case.model, tuple(t[:1] for t in case.batch), case.loss)
    expected = one_example_loop(single.model, single.batch, single.loss)
    formed = recorded(single).per_example_gradients()
    for key, gradient in expected.items():
        assert relative_error(formed[key], gradient) <= 1e-9, key


def test_float32_is_close() -> None:
    torch.set_default_dtype(torch.float32)
    case = ZOO["gpt2_tied"]()
    tape = recorded(case)
    norms = tape.norms()
    torch.set_default_dtype(torch.float64)
    case = Case(case.model.double(), case.batch, case.loss)
    torch.testing.assert_close(norms.double(), recorded(case).norms(), rtol=1e-4, atol=0)


# -- negative controls: each of these twins is wrong in a way a peer was; the loop must see it -------


def _norm_error(case: Case, broken: torch.Tensor) -> float:
    expected = one_example_loop(case.model, case.batch, case.loss)
    return relative_error(broken, norms_of(expected))


@pytest.mark.parametrize("name", ["gpt2_tied", "layer_used_twice", "functional_tied_head"])
def test_a_norm_without_cross_terms_is_caught(name: str) -> None:
    case = ZOO[name]()
    tape = recorded(case)
    squared = [f.squared_norm() for forms in tape._store._forms.values() for f in forms]
    broken = torch.stack(squared).sum(0).sqrt()
    if name == "layer_used_twice":  # both uses were merged; take them apart again
        form = tape._store._forms[id(case.model.a.weight)][0]
        half = form.left.shape[1] // 2
        cross = 2 * (
            (form.left[:, :half] * form.left[:, half:]).sum(-1)
            * (form.right[:, :half] * form.right[:, half:]).sum(-1)
        ).sum(1)
        broken = (broken.square() - cross).sqrt()
    assert _norm_error(case, broken) > 1e-6
    assert _norm_error(case, tape.norms()) < 1e-9


def test_a_forgotten_parameter_is_caught() -> None:
    case = ZOO["class_token_and_positions"]()
    tape = recorded(case)
    squared = tape.squared_norms()
    broken = torch.stack([s for n, s in squared.items() if n != "cls"]).sum(0).sqrt()
    assert _norm_error(case, broken) > 1e-6
