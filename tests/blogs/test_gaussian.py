"""The Gaussian sibling: norms and noise per layer as stated, one accountant, shuffled only after."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dptorch.blogs import BloGSPrivacyEngine
from dptorch.blogs.noisy_steps import group_settings
from dptorch.errors import ConfigurationError

RECORDS, BATCH, STEPS = 64, 16, 8


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4))


def _data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        10 * torch.randn(RECORDS, 20, generator=generator), torch.arange(RECORDS) % 4
    )


def _engine(model, *, lr=0.0, **settings):
    defaults = {
        "target_epsilon": 1.0,
        "delta": 1e-5,
        "clip_value": 0.5,
        "steps": STEPS,
        "batch_size": BATCH,
        "dataset_size": RECORDS,
        "mechanism": "gaussian",
        "seed": 0,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return BloGSPrivacyEngine(optimizer, model, **{**defaults, **settings})


def _released(engine, model, batches=1):
    """What the optimizer got, times the batch size: the noisy sums."""
    found = []
    for x, y in engine.loader(_data()):
        engine.zero_grad()
        F.cross_entropy(model(x), y).backward()
        engine.step()
        found.append({n: BATCH * p.grad.clone() for n, p in model.named_parameters()})
        if len(found) == batches:
            break
    return found


def _layer(name):
    return name.split(".")[0]


def _step_on(model, engine, x, y, factor=1.0):
    engine.zero_grad()
    (factor * F.cross_entropy(model(x), y)).backward()
    engine.step()
    return {n: BATCH * p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_a_step_is_the_sum_of_gradients_clipped_layer_by_layer():
    """Against a loop over single examples; a seed's noise is what a loss of zero releases."""
    norms = {"0": 0.5, "2": 0.2}
    x, y = (t[:BATCH] for t in _data().tensors)
    model, silent = _model(), _model()
    noisy = _step_on(model, _engine(model, clip_value=norms), x, y)
    noise = _step_on(silent, _engine(silent, clip_value=norms), x, y, factor=0.0)
    plain = _model()
    expected = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    clipped = 0
    for i in range(BATCH):
        loss = F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        named = dict(zip(expected, gradients, strict=True))
        for layer, norm in norms.items():
            inside = {n: g for n, g in named.items() if _layer(n) == layer}
            size = math.sqrt(sum(float(g.square().sum()) for g in inside.values()))
            clipped += size > norm
            for n, g in inside.items():
                expected[n] += g * min(1.0, norm / size)
    assert clipped > BATCH
    for n in expected:
        torch.testing.assert_close(noisy[n] - noise[n], expected[n], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("weights", ["equal", "size", {"0": 0.9, "2": 0.1}])
def test_noise_of_a_layer_is_sigma_c_over_root_w(weights):
    """Kolmogorov-Smirnov on the noise of each layer at false alarm 1e-4, seeds fixed; a twin that
    forgets the weights is caught."""
    from scipy import stats

    norms = {"0": 0.5, "2": 0.2}
    model = _model()
    engine = _engine(model, clip_value=norms, weights=weights)
    sigma = engine._steps.engine.noise_multiplier
    shares = {
        p.split(".")[0]: w for p, (_, w) in group_settings(model, norms, "layer", weights).items()
    }
    assert sum(shares.values()) == pytest.approx(1.0)
    noise = {layer: [] for layer in norms}
    x, y = _data().tensors
    for _ in range(STEPS):
        for n, value in _step_on(model, engine, x, y, factor=0.0).items():
            noise[_layer(n)].append(value.flatten())
    for layer, norm in norms.items():
        values = torch.cat(noise[layer]).double().numpy()
        stddev = sigma * norm / math.sqrt(shares[layer])
        assert stats.kstest(values, "norm", (0, stddev)).pvalue > 1e-4
        if shares[layer] < 0.6:
            assert stats.kstest(values, "norm", (0, sigma * norm)).pvalue < 1e-2


def test_norms_and_weights_cost_nothing():
    """σ is that of flat clipping at the same ε, whatever norms and weights."""
    sigmas = {
        round(_engine(_model(), **s)._steps.engine.noise_multiplier, 12)
        for s in (
            {},
            {"weights": "size"},
            {"weights": {"0": 0.99, "2": 0.01}},
            {"clip_value": {"0": 3.0, "2": 0.001}},
            {"allocation": "parameter"},
        )
    }
    assert len(sigmas) == 1


def test_size_weights_make_the_least_noise():
    model = _model()
    sizes = {"0": 252, "2": 52}

    def power(weights):
        return sum(
            sizes[p.split(".")[0]] * c**2 / w
            for p, (c, w) in group_settings(model, 0.7, "layer", weights).items()
        )

    assert power("size") < power("equal")
    for share in (0.55, 0.65, 0.75, 0.85):
        assert power("size") <= power({"0": share, "2": 1 - share}) + 1e-9


def test_what_is_spent_is_proven_and_stops():
    model = _model()
    engine = _engine(model, lr=0.1, seed=None)
    values = []
    for _ in range(3):
        for x, y in engine.loader(_data()):
            engine.zero_grad()
            F.cross_entropy(model(x), y).backward()
            epsilon, delta = engine.step()
            values.append(float(epsilon))
    assert len(values) == STEPS
    assert engine.exhausted
    assert values == sorted(values)
    assert values[-1] <= 1.0
    spent = engine.get_privacy_spent()
    assert f"{spent:.4f}" == f"{values[-1]:.4f}"
    assert spent.formal_epsilon == float(spent)
    assert spent.nominal_epsilon is None
    assert delta == 1e-5
    assert "differentially private" in str(engine.statement())
    seeded = _engine(_model()).get_privacy_spent()
    assert seeded.formal_epsilon == float("inf")
    assert seeded.guarantee == "none (the seed of the noise is known)"


def test_blocks_are_shuffled_after_the_noise_and_only_then():
    plain_model, model = _model(), _model()
    plain = _released(_engine(plain_model), plain_model, 2)
    shuffled = _released(_engine(model, shuffle_blocks=1), model, 2)
    for a, b in zip(plain, shuffled, strict=True):
        for n in a:
            assert not torch.equal(a[n], b[n])
            assert Counter(a[n].flatten().tolist()) == Counter(b[n].flatten().tolist())


def test_a_layer_inside_another_is_a_group_of_its_own():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.inner = nn.Linear(4, 4)

    model = nn.Sequential(Scaled(), nn.Linear(4, 2))
    engine = BloGSPrivacyEngine(
        torch.optim.SGD(model.parameters(), lr=0.1), model, 1.0, 1e-5, 1.0, 2, 2, 8,
        mechanism="gaussian",
    )  # fmt: skip
    groups = {g.name: g.parameters for g in engine._steps.engine._batch.groups}
    assert groups == {
        "0.inner.*": ("0.inner.weight", "0.inner.bias"),
        "0.*": ("0.scale",),
        "1.*": ("1.weight", "1.bias"),
    }


def test_a_resumed_run_is_the_run():
    def run(engine, model, batches):
        found = []
        while len(found) < batches:
            found += _released(engine, model, batches - len(found))
        return found

    whole_model = _model()
    whole = run(_engine(whole_model, lr=0.1), whole_model, 4)
    model = _model()
    first = _engine(model, lr=0.1)
    run(first, model, 2)
    state, weights = first.state_dict(), model.state_dict()
    second_model = _model()
    second_model.load_state_dict(weights)
    second = _engine(second_model, lr=0.1, seed=None)
    second.load_state_dict(state)
    rest = run(second, second_model, 2)
    assert second.steps_done == 4
    for n in rest[-1]:
        torch.testing.assert_close(rest[-1][n], whole[-1][n])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dataset_size": None}, "dataset_size"),
        ({"weights": "equl"}, "Did you mean 'equal'"),
        ({"weights": {"0": 1.0}}, "no entry for '2'"),
        ({"weights": {"0": 0.5, "2": 0.6}}, "sum to 1"),
        ({"clip_value": {"0": 1.0, "3": 1.0}}, "group in clip_value"),
        ({"clip_value": -1.0}, r"clip_value=-1\.0"),
        ({"shuffle_blocks": 0}, "shuffle_blocks=0"),
        ({"index": "2024"}, "'index' is not known"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ConfigurationError, match=message):
        _engine(_model(), **setting)


def test_the_shuffle_has_no_loader_of_its_own():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(Warning, match="withdrawn"):
        engine = BloGSPrivacyEngine(optimizer, model, 50.0, 1e-5, 1.0, 4, 8)
    with pytest.raises(ConfigurationError, match="any DataLoader"):
        engine.loader(_data())
