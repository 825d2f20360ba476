"""The self-check: what is right must pass, and each broken twin must be caught by name."""
# ruff: noqa: NPY002  (models in the wild use numpy's global generator)

import copy
import json
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.tape.zoo import ZOO, published
from torch import Tensor, nn

import dptorch
from dptorch.errors import ConfigurationError, ExamplesMixError, PrivacyWarning
from dptorch.tape.rules.registry import RULES
from dptorch.validation import reruns
from dptorch.validation.chance import FixedChance
from dptorch.validation.conversion import prepare
from dptorch.validation.gradient_check import CheckReport, check
from dptorch.validation.mixing import find_mixing, refuse_mixing

N = 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batch(features: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(N, features), torch.randint(0, classes, (N,))


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def faults(report: CheckReport) -> list[tuple[str, str]]:
    return [(f.kind, f.where) for f in report.findings if f.fault]


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *middle, nn.Linear(4, 3))


# -- what is right ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2_tied", "resnet_groupnorm", "lora_on_gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_without_fault_pass(name: str, dtype: torch.dtype) -> None:
    case = ZOO[name]()
    model = case.model.to(dtype)
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in case.batch]
    report = check(model, inputs, lambda m, b: case.loss(m, *b))
    assert report.ok, str(report)
    assert report.error <= report.tolerance
    assert report.leakage <= report.tolerance
    assert {r.status for r in report.parameters} == {"exact"}
    assert "NOT" not in str(report)


def test_sparse_gradients_are_compared_as_dense_ones() -> None:
    class Rated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(5, 3, sparse=True)

        def forward(self, items: Tensor) -> Tensor:
            return self.items(items).sum(1)

    rated = torch.tensor([0, 1, 1, 4, 2, 0]), torch.randn(N)
    report = check(Rated(), rated, lambda m, b: F.mse_loss(m(b[0]), b[1]))
    assert report.ok, str(report)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reduction_of_the_loss_is_seen(reduction: str) -> None:
    def loss(model: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(b[0]), b[1], reduction=reduction)

    report = check(mlp(), batch(), loss)
    assert report.ok
    assert report.loss_reduction == reduction


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_no_error_of_the_tape(smoothing: float) -> None:
    """A weight is as much as it says, with and without positions that do not count."""
    weight, settings = torch.tensor([1.0, 2.0, 9.0]), {"label_smoothing": smoothing}
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=weight, **settings)
    assert check(mlp(), batch(), loss).ok
    x, y = batch()
    y[1] = -100
    layer = nn.CrossEntropyLoss(weight)
    assert check(mlp(), (x, y), lambda m, b: layer(m(b[0]), b[1])).ok


def test_nothing_is_left_changed() -> None:
    model = mlp(nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    model[0].weight.grad = torch.ones(4, 4)
    grad = model[0].weight.grad
    state = {k: v.clone() for k, v in model.state_dict().items()}
    data = batch()
    copies = [t.clone() for t in data]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    check(model, data, mean_loss)
    assert model[0].weight.grad is grad
    assert bool((grad == 1).all())
    assert model[2].weight.grad is None if hasattr(model[2], "weight") else True
    assert not any(m.training for m in model.modules())
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), k
    for t, c in zip(data, copies, strict=True):
        assert torch.equal(t, c)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert bool((np.random.get_state()[1] == generators[2]).all())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_dropout_and_noise_are_held_fixed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4, batch_first=True)
            self.rnn = nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x[:, None].expand(-1, 5, -1))
            h = h + 0.3 * torch.randn_like(h) + torch.empty_like(h).uniform_(-1, 1)
            keep = h.new_empty(h.shape[0], 1, 1).bernoulli_(0.8)
            h = F.dropout(self.rnn(h * keep)[0], 0.3, self.training)
            return self.head(h[:, -1])

    report = check(Noisy(), batch(), mean_loss)
    assert report.ok, str(report)
    assert report.mode == "training mode without chance"


def test_chance_that_cannot_be_fixed_is_said() -> None:
    class Numpy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(np.random.rand()) if self.training else x

    report = check(mlp(Numpy()), batch(), mean_loss)
    assert report.ok
    assert report.mode == "evaluation mode"
    assert [f.kind for f in report.findings] == ["random"]

    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(np.random.rand())

    report = check(mlp(Always()), batch(), mean_loss)
    assert not report.ok
    assert faults(report) == [("random", "the model or the loss function")]
    assert {r.status for r in report.parameters} == {"not compared"}


def test_mappings_shared_inputs_and_sequence_first() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, x_TND: Tensor, table: Tensor, scale: Tensor) -> Tensor:
            return self.head(self.rnn(x_TND)[0][-1]) * scale + table.sum()

    data = {
        "x": torch.randn(7, N, 3),
        "table": torch.randn(9),
        "scale": torch.tensor(2.0),
        "y": torch.randint(0, 2, (N,)),
        "names": [str(i) for i in range(N)],
    }

    def loss(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        assert len(b["names"]) == len(b["y"])
        return F.cross_entropy(model(b["x"], b["table"], b["scale"]), b["y"])

    report = check(Model(), data, loss, batch_dims={"x_TND": 1, "table": None})
    assert report.ok, str(report)
    with pytest.raises(ConfigurationError, match="batch_dims"):
        check(Model(), data, loss)


def test_a_model_with_an_engine_can_be_checked() -> None:
    model = mlp()
    engine = dptorch.PrivacyEngine(
        model, batch_size=4, sample_size=8, steps=2, noise_multiplier=1.0, target_delta=1e-3, seed=0
    )
    assert check(model, batch(), mean_loss).ok
    assert engine.steps_done == 0


# -- negative controls: each is caught, by name ----------------------------------------------------


class Centred(nn.Module):
    """Subtracts the batch mean, in the open."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(0))


class CentredByNumpy(Centred):
    """The same where a recording cannot see it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - torch.from_numpy(x.detach().numpy().mean(0)))


class ScaledByItem(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.std().item()


class Balanced(nn.Module):
    """A mixture of experts with a load-balance loss (Shazeer et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.balance = Balance()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(-1)
        out = sum(p[:, i, None] * e(x) for i, e in enumerate(self.experts))
        return out, self.balance(p)


class Balance(nn.Module):
    def forward(self, p: Tensor) -> Tensor:
        return (p.mean(0) * p.mean(0)).sum()


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_is_caught(affine: bool) -> None:
    model = mlp(nn.BatchNorm1d(4, affine=affine)).eval()
    report = check(model, batch(), mean_loss)
    assert faults(report) == [("examples mix", "module '1' (BatchNorm1d)")]
    assert "dptorch.prepare" in str(report)
    assert check(model, batch(), mean_loss, training=False).ok
    assert check(prepare(model, report=None), batch(), mean_loss).ok


@pytest.mark.parametrize("kind", [Centred, CentredByNumpy, ScaledByItem])
def test_batch_statistics_are_caught(kind: type[nn.Module]) -> None:
    report = check(mlp(kind()), batch(), mean_loss)
    assert not report.ok
    assert ("examples mix", f"module '1' ({kind.__name__})") in faults(report)


def test_the_module_that_passed_a_mixture_on_is_named_not_the_one_that_got_it() -> None:
    x, _ = batch()
    assert find_mixing(mlp(Centred()), (x,), {}) == "module '1' (Centred)"
    assert find_mixing(mlp(nn.ReLU()), (x,), {}) == ""
    assert find_mixing(mlp(), (x[:1],), {}) is None
    assert find_mixing(mlp(), (x[:1].expand(3, -1),), {}) is None


def test_a_read_into_python_is_noted_with_its_module() -> None:
    class Logged(nn.Module):
        def __init__(self, trusted: bool) -> None:
            super().__init__()
            self.trusted = trusted

        def forward(self, x: Tensor) -> Tensor:
            with dptorch.tape.trusted_reads() if self.trusted else nullcontext():
                self.last = x[0, 0].item()
            return x

    report = check(mlp(Logged(trusted=False)), batch(), mean_loss)
    kind, where = faults(report)[0]
    assert kind == "examples mix"
    assert "module '1' (Logged), test_gradient_check.py" in where
    report = check(mlp(Logged(trusted=True)), batch(), mean_loss)
    assert report.ok
    assert [(f.kind, f.where) for f in report.findings] == [("escape", "module '1' (Logged)")]


def in_batch_negatives(model: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
    h = model(b[0])
    return F.cross_entropy(h @ h.t(), torch.arange(len(h)))


def hardest_first(model: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
    losses = F.cross_entropy(model(b[0]), b[1], reduction="none")
    weights = torch.from_numpy(np.exp(losses.detach().numpy()))  # out of the recording's sight
    return losses * (weights / weights.sum())


@pytest.mark.parametrize("loss", [in_batch_negatives, hardest_first])
def test_losses_that_mix_are_caught(loss) -> None:
    report = check(mlp(), batch(), loss)
    assert faults(report) == [("examples mix", "the loss function")]


def test_a_balance_loss_is_caught() -> None:
    def loss(model: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        logits, balance = model(b[0])
        return F.cross_entropy(logits, b[1]) + 0.1 * balance

    def without(model: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(b[0])[0], b[1])

    report = check(Balanced(), batch(), loss)
    assert [k for k, _ in faults(report)] == ["examples mix"]
    assert faults(report)[0][1] == "module 'balance' (Balance)"
    assert check(Balanced(), batch(), without).ok


def test_a_broken_rule_is_caught_with_the_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RULES["layer_norm"]

    def forgets_the_bias(call, recording):
        taken = recording.tap

        def tap(call, out, tags, saved, gradients):
            def wrong(grads, kept):
                for p, form in gradients(grads, kept):
                    if p.shape == (4,) and recording.tape.names[id(p)].endswith("bias"):
                        form.values = form.values * 1.01
                    yield p, form

            return taken(call, out, tags, saved, wrong)

        recording.tap = tap
        try:
            return original(call, recording)
        finally:
            del recording.tap

    monkeypatch.setitem(RULES, "layer_norm", forgets_the_bias)
    report = check(mlp(nn.LayerNorm(4)), batch(), mean_loss)
    assert faults(report) == [("inexact", "1.bias")]
    row = next(r for r in report.parameters if r.name == "1.bias")
    assert row.status == "inexact"
    assert row.error == pytest.approx(0.01, rel=1e-3)
    assert report.dtype == "float64"  # rounding was ruled out
    assert "1.bias" in str(report)


def test_a_wrong_norm_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from dptorch.tape.gradients import Outer, PerExampleGradient

    right = Outer.measured

    def wrong(self: Outer, way: str) -> tuple[Tensor, PerExampleGradient]:
        squared, kept = right(self, way)
        return squared * 1.001, kept

    monkeypatch.setattr(Outer, "measured", wrong)
    report = check(mlp(), batch(), mean_loss)
    assert ("inexact", "0.weight, 2.weight") in faults(report) or (
        "inexact",
        "0.weight, 1.weight",
    ) in faults(report)


@torch.library.custom_op("dptorch_tests::joined", mutates_args=())
def _joined(x: Tensor, w: Tensor) -> Tensor:
    """An operator that nobody has told the tape about."""
    return x * w


_joined.register_autograd(
    lambda ctx, g: (g * ctx.saved_tensors[1], (g * ctx.saved_tensors[0]).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_uncovered_and_unused_parameters_are_told_apart() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)
            self.left = nn.Parameter(torch.randn(3))
            self.right = nn.Parameter(torch.randn(3))
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return _joined(_joined(self.a(x), self.left), self.right)

    model = Joined()
    report = check(model, batch(), mean_loss)
    status = {r.name: r.status for r in report.parameters}
    assert status["left"] == "not covered"
    assert not report.ok
    assert ("not covered", "left") in faults(report)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_a_recording_cannot_see_is_a_fault() -> None:
    with pytest.warns(DeprecationWarning, match="jit"):
        model = mlp(torch.jit.script(nn.Linear(4, 4)))
    report = check(model, batch(), mean_loss)
    assert {k for k, _ in faults(report)} == {"not covered"}
    assert {r.status for r in report.parameters} == {"not compared"}


def test_an_unused_parameter_is_noted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    report = check(Model(), batch(), mean_loss)
    assert report.ok
    assert {r.name: r.status for r in report.parameters} == {
        "a.weight": "exact",
        "a.bias": "exact",
        "idle.weight": "no gradient",
        "idle.bias": "no gradient",
    }
    assert [(f.kind, f.where) for f in report.findings] == [
        ("no gradient", "idle.weight, idle.bias")
    ]


def test_the_slow_way_is_listed_with_its_cost() -> None:
    case = ZOO["bilinear"]()
    model = case.model.float()
    inputs = [t.float() if t.is_floating_point() else t for t in case.batch]
    report = check(model, inputs, lambda m, b: case.loss(m, *b))
    slow = [f for f in report.findings if f.kind == "slow"]
    for f in slow:
        assert not f.fault
        assert "bytes" in f.message or "KiB" in f.message
    assert {op for r in report.parameters for op in r.slow_ops} == {
        f.message.split("'")[1] for f in slow
    }


# -- arguments -------------------------------------------------------------------------------------


def test_what_cannot_be_checked_is_refused() -> None:
    x, y = batch()
    with pytest.raises(ConfigurationError, match="one example"):
        check(mlp(), (x[:1], y[:1]), mean_loss)
    with pytest.raises(ConfigurationError, match="same inputs"):
        check(mlp(), (x[:1].expand(3, -1), y[:3]), mean_loss)
    with pytest.raises(ConfigurationError, match="not a finite"):
        check(mlp(), (x * torch.inf, y), mean_loss)
    with pytest.raises(ConfigurationError, match="returned a float"):
        check(mlp(), (x, y), lambda m, b: mean_loss(m, b).item())
    with pytest.raises(ConfigurationError, match="does not require grad"):
        check(mlp(), (x, y), lambda m, b: mean_loss(m, b).detach())
    with pytest.raises(ConfigurationError, match=r"did not call.*Call model\(\.\.\.\) itself"):
        check(mlp(), (x, y), lambda m, b: b[0].sum())
    with pytest.raises(ConfigurationError, match="no trainable"):
        check(mlp().requires_grad_(False), (x, y), mean_loss)


def test_the_report_is_plain_data() -> None:
    report = check(mlp(), batch(), mean_loss, examples=3)
    data = report.to_dict()
    assert data["ok"] is True
    assert data["examples"] == 3
    assert [row["name"] for row in data["parameters"]] == [n for n, _ in mlp().named_parameters()]
    assert "0.weight" in report.table(every_parameter=True)
    assert "0.weight" not in str(report)


def test_fixed_chance_gives_every_shape_the_same_draws() -> None:
    with FixedChance():
        assert torch.randn(3).tolist() == torch.randn(5)[:3].tolist()
        assert torch.normal(torch.tensor([1.0, 2.0]), 2.0).tolist() == [2.5, 3.5]
        assert torch.empty(2).normal_(1.0, 2.0).tolist() == [2.5, 2.5]
        assert torch.empty(2).uniform_(1, 3).tolist() == [2.0, 2.0]
        assert torch.bernoulli(torch.tensor([0.2, 0.9])).tolist() == [0.0, 1.0]
        assert torch.empty(2).bernoulli_(0.9).tolist() == [1.0, 1.0]
        assert torch.randint(0, 10, (2,)).tolist() == [5, 5]
        assert torch.randperm(4).tolist() == [0, 1, 2, 3]


# -- the engine's version --------------------------------------------------------------------------


def test_the_engine_refuses_by_name_and_leaves_no_trace() -> None:
    model = mlp(CentredByNumpy())
    engine = dptorch.PrivacyEngine(
        model, batch_size=4, sample_size=8, steps=2, noise_multiplier=1.0, target_delta=1e-3, seed=0
    )
    with pytest.raises(ExamplesMixError, match=r"module '1' \(CentredByNumpy\)"):
        model(batch()[0])
    assert all(p.grad is None for p in model.parameters())
    assert engine.steps_done == 0


class Stateful(nn.Module):
    """Everything a forward pass may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moving", torch.zeros(4))
        self.register_buffer("replaced", torch.zeros(4))
        self.plain = torch.zeros(4)
        self.calls = 0
        self.generator = torch.Generator().manual_seed(3)
        self.cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.moving.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.replaced = self.replaced * 0.9 + x.detach().mean(0) * 0.1
        self.plain += 1
        self.cached = torch.zeros(len(x))
        noise = torch.randn(4, generator=self.generator)
        return x + noise + random.random() + float(np.random.rand()) + torch.rand(4)


def test_state_and_random_numbers_are_restored_and_raise_no_alarm() -> None:
    model = mlp(Stateful(), nn.Dropout())
    module = model[1]
    x, _ = batch()
    before = torch.get_rng_state(), random.getstate(), module.generator.get_state()
    moving, replaced = module.moving, module.replaced
    assert refuse_mixing(model, (x,), {}, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.equal(module.generator.get_state(), before[2])
    assert module.calls == 0
    assert module.cached is None
    assert module.moving is moving
    assert module.replaced is replaced
    assert not moving.any()
    assert not module.plain.any()


class Capturing(nn.Module):
    """Registers a hook when it first runs, and notes that in an attribute, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.installed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            self.layer.register_forward_hook(self.capture)
            self.installed = True
        self.states: list[Tensor] = []
        self.layer(x)
        return torch.stack(self.states).sum(0)  # twice as large if the hook is there twice

    def capture(self, layer: nn.Module, args: object, output: Tensor) -> None:
        self.states.append(output)


def test_hooks_of_a_first_run_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = batch()

    def outputs() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = mlp(Capturing())
        expected = copy.deepcopy(model)(x)
        assert refuse_mixing(model, (x,), {}, 0)
        return model(x), expected

    found, expected = outputs()
    assert torch.equal(found, expected)
    # The broken twin: the attribute is restored and the hook stays.
    monkeypatch.setattr(reruns, "_HOOKS", ("none",))
    found, expected = outputs()
    assert not torch.allclose(found, expected)


def test_a_model_that_never_repeats_itself_raises_no_alarm() -> None:
    ticks = iter(range(1, 100))

    class Clock(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * next(ticks)

    assert refuse_mixing(mlp(Clock()), (batch()[0],), {}, 0)


def test_masks_lists_and_failures_raise_no_alarm() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
            assert len(lengths) == len(x)
            return x.masked_fill(x > 0, torch.finfo(x.dtype).min)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = Masked()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
            return self.a(self.mask(x, lengths).clamp(-1, 1))

    assert find_mixing(Model(), (batch()[0], [1] * N), {}) == ""

    first = iter([True])

    class Once(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not next(first, False):
                raise RuntimeError("only once")
            return x

    with pytest.warns(PrivacyWarning, match="only once"):
        assert refuse_mixing(mlp(Once()), (batch()[0],), {}, 0)


def test_a_mixture_behind_huge_mask_values_is_seen() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mixed = x + 0.1 * torch.from_numpy(x.detach().numpy().mean(0))
            return torch.cat([mixed, torch.full_like(x[:, :1], torch.finfo(x.dtype).min)], 1)

    x, _ = batch()
    assert find_mixing(nn.Sequential(Hidden()), (x,), {}) == "module '0' (Hidden)"


def test_a_mixture_behind_a_head_of_zeros_is_seen() -> None:
    model = mlp(CentredByNumpy())
    nn.init.zeros_(model[-1].weight)
    assert find_mixing(model, (batch()[0],), {}) == "module '1' (CentredByNumpy)"


def test_evaluation_mode_wrappers_and_keyword_inputs() -> None:
    x, _ = batch()
    assert find_mixing(mlp(nn.BatchNorm1d(4)).eval(), (x,), {}) == ""
    assert find_mixing(nn.DataParallel(mlp(nn.BatchNorm1d(4))), (x,), {}) == (
        "module '1' (BatchNorm1d)"
    )

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, *, inputs: dict[str, Tensor], mask: Tensor, scale: float) -> object:
            return {"logits": [self.norm(inputs["x"]) * mask * scale]}

    arguments = {"inputs": {"x": x}, "mask": torch.ones(1, 4), "scale": 2.0}
    assert find_mixing(Keywords(), (), arguments) == "module 'norm' (BatchNorm1d)"
    assert find_mixing(Keywords().eval(), (), arguments) == ""


def test_half_precision_still_sees_batchnorm() -> None:
    x, _ = batch()
    model = mlp(nn.BatchNorm1d(4)).to(torch.bfloat16)
    assert find_mixing(model, (x.bfloat16(),), {}) == "module '1' (BatchNorm1d)"
    assert find_mixing(mlp(nn.LayerNorm(4)).to(torch.bfloat16), (x.bfloat16(),), {}) == ""


@pytest.mark.slow
def test_compiled_models_are_looked_at_uncompiled() -> None:
    model = torch.compile(mlp(nn.BatchNorm1d(4)))
    assert find_mixing(model, (batch()[0],), {}) == "module '1' (BatchNorm1d)"


class _CalledError(Exception):
    """Carries the arguments of the first call of a model."""


# One of each kind; the whole zoo goes through the tape's own tests.
_FAMILIES = [
    *("mlp", "resnet_groupnorm", "gpt2_tied", "vit", "layer_used_twice", "functional_tied_head"),
    *("raw_matmuls", "token_mixing", "class_token_and_positions", "position_table"),
    *("assigned_and_masked", "frames_folded_into_the_batch", "norms_of_all_kinds"),
    *("prelu_and_weight_norm", "attention_sequence_first", "lstm_and_gru", "swin_windows"),
    *("bert", "llama", "t5_relative_bias", "bart", "lora_on_gpt2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.zoo if published(n) else ()) for n in _FAMILIES]
)
def test_no_false_alarm_on_the_zoo(name: str) -> None:
    def stop(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        raise _CalledError(args, kwargs)

    torch.set_default_dtype(torch.float64)
    try:
        case = ZOO[name]()
        handle = case.model.register_forward_pre_hook(stop, with_kwargs=True)
        with pytest.raises(_CalledError) as called:
            case.loss(case.model, *case.batch)
        handle.remove()
        args, kwargs = called.value.args
        assert find_mixing(case.model, args, kwargs, getattr(case, "batch_dims", 0)) == ""
    finally:
        torch.set_default_dtype(torch.float32)


# -- the command line ------------------------------------------------------------------------------


def mixing_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def language_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 20))


def invoke(*arguments: str):
    from typer.testing import CliRunner

    from dptorch.cli.app import app

    return CliRunner().invoke(app, ["check", *arguments])


def test_the_command_line() -> None:
    result = invoke("mlp", "--input-shape", "3,2,2")
    assert result.exit_code == 0, result.output
    assert "Sequential: ok" in result.output

    here = f"{__name__}:mixing_model"
    result = invoke(here, "--input-shape", "3,2,2", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert report["findings"][0]["where"] == "module '2' (BatchNorm1d)"
    assert report["error"] is None
    result = invoke(here, "--input-shape", "3,2,2", "--prepare", "--all", "--dtype", "float64")
    assert result.exit_code == 0
    assert "1.weight" in result.output

    result = invoke(f"{__name__}:language_model", "--input-shape", "7", "--vocab-size", "20")
    assert result.exit_code == 0, result.output
    assert invoke("mlp", "--input-shape", "3,a").exit_code == 2


def test_zero_initialised_layers_do_not_hide_gradients_on_the_command_line() -> None:
    result = invoke("linear", "--input-shape", "3,2,2", "--json")
    assert {r["status"] for r in json.loads(result.stdout)["parameters"]} == {"exact"}


def test_a_zero_gradient_is_not_called_exact() -> None:
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    report = check(model, batch(), mean_loss)
    assert {r.name: r.status for r in report.parameters}["0.weight"] == "no gradient"
    assert any("not put to the test" in f.message for f in report.findings)
