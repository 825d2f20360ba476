"""Conversion of what mixes examples."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.errors import ConfigurationError
from dptorch.validation.conversion import FrozenBatchNorm, Preparation, preparation, prepare
from dptorch.validation.mixing import find_mixing


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def silent(model: nn.Module, **kwargs) -> nn.Module:
    return prepare(model, report=None, **kwargs)


def trained(norm: nn.Module, *shape: int) -> nn.Module:
    """As a BatchNorm is after training: statistics, scale and shift away from their start."""
    norm.train()
    c = norm.num_features
    for _ in range(50):
        norm(
            torch.randn(16, c, *shape) * torch.linspace(0.5, 2, c).view(1, -1, *[1] * len(shape))
            + 1
        )
    if norm.affine:
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias)
    return norm


def mixes(model: nn.Module, x: Tensor) -> str | None:
    return find_mixing(model.train(), (x,), {})


KINDS = [
    (nn.BatchNorm1d, ()),
    (nn.BatchNorm1d, (5,)),
    (nn.BatchNorm2d, (4, 4)),
    (nn.BatchNorm3d, (2, 3, 3)),
    (nn.SyncBatchNorm, (4, 4)),
]


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", ["group", "frozen", "auto"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_every_kind_stops_mixing(
    kind: type[nn.Module], shape: tuple[int, ...], affine: bool, batchnorm: str
) -> None:
    norm = kind(32, affine=affine)
    if kind is not nn.SyncBatchNorm:  # which trains on a GPU only
        trained(norm, *shape)
        assert mixes(copy.deepcopy(norm), torch.randn(4, 32, *shape)) is not None
    model = silent(nn.Sequential(norm), batchnorm=batchnorm)
    x = torch.randn(6, 32, *shape)
    assert mixes(model, x) == ""
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == (["0.weight", "0.bias"] if affine else [])


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_is_eval_mode_bit_for_bit(affine: bool) -> None:
    norm = trained(nn.BatchNorm2d(8, affine=affine), 4, 4)
    x = torch.randn(3, 8, 4, 4)
    expected = copy.deepcopy(norm).eval()(x)
    model = silent(nn.Sequential(norm), batchnorm="frozen").train()
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(model(x), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    fresh = nn.Sequential(nn.BatchNorm2d(8, affine=affine))
    fresh.load_state_dict(model.state_dict())  # checkpoints go both ways
    assert torch.equal(fresh.eval()(x), expected)


@pytest.mark.parametrize("affine", [True, False])
def test_folding_is_exact_where_the_example_has_the_running_statistics(affine: bool) -> None:
    """An input whose channels have exactly the running mean and variance, over its positions."""
    c, positions = 32, 4096
    norm = trained(nn.BatchNorm1d(c, affine=affine, eps=1e-5), 5).double()
    x = torch.randn(1, c, positions, dtype=torch.float64)
    x = (x - x.mean(2, keepdim=True)) / x.std(2, correction=0, keepdim=True)
    x = x * norm.running_var.sqrt().view(1, -1, 1) + norm.running_mean.view(1, -1, 1)
    expected = copy.deepcopy(norm).eval()(x)
    folded = silent(nn.Sequential(copy.deepcopy(norm)), batchnorm="group")
    copied = silent(nn.Sequential(copy.deepcopy(norm)), batchnorm="group", fold=False)
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
    assert (copied(x) - expected).abs().max() > 0.1  # the negative control


def test_folding_keeps_a_trained_function_better() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32)
    )
    x = torch.randn(64, 3, 12, 12) * torch.tensor([0.5, 1, 3]).view(1, 3, 1, 1) + 1
    for _ in range(30):
        model(x)
    model.eval()

    def drift(**kwargs) -> float:
        other = silent(copy.deepcopy(model), batchnorm="group", **kwargs)
        return ((other(x) - model(x)).norm() / model(x).norm()).item()

    assert drift() < 0.5 * drift(fold=False)


def test_auto_freezes_what_goes_with_frozen_layers() -> None:
    model = nn.Sequential(
        trained(nn.BatchNorm2d(16), 4, 4).requires_grad_(False), nn.BatchNorm2d(16)
    )
    names = [type(m).__name__ for m in silent(model)]
    assert names == ["FrozenBatchNorm", "GroupNorm"]


def test_parameters_stay_the_same_objects() -> None:
    for batchnorm in ("group", "frozen"):
        model = nn.Sequential(nn.Conv2d(3, 16, 3), trained(nn.BatchNorm2d(16), 4, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        names = [n for n, _ in model.named_parameters()]
        before = [id(p) for p in model.parameters()]
        silent(model, batchnorm=batchnorm)
        assert [id(p) for p in model.parameters()] == before
        assert [n for n, _ in model.named_parameters()] == names
        assert [id(p) for g in optimizer.param_groups for p in g["params"]] == before


def test_idempotent_and_readable(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.InstanceNorm2d(32, track_running_stats=True)
    )
    planned = preparation(model)
    assert isinstance(model[1], nn.BatchNorm2d)  # a plan changes nothing
    assert prepare(model) is model
    printed = capsys.readouterr().out
    assert printed.strip() == str(planned)
    assert "1" in printed
    assert "BatchNorm2d -> GroupNorm" in printed
    assert [c.module for c in planned.changes] == ["1", "2"]
    state = copy.deepcopy(model.state_dict())
    prepare(model)
    assert capsys.readouterr().out == "dptorch.prepare: nothing to change.\n"
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert preparation(model) == Preparation(())


def test_mode_device_dtype_flags_and_hooks_are_kept() -> None:
    norm = nn.BatchNorm2d(16).to(torch.bfloat16).eval()
    norm.weight.requires_grad_(False)
    seen = []
    handle = norm.register_forward_hook(lambda *_: seen.append(1))
    model = silent(nn.Sequential(norm))
    new = model[0]
    assert not new.training
    assert new.weight.dtype == torch.bfloat16
    assert not new.weight.requires_grad
    assert new.bias.requires_grad
    model(torch.randn(2, 16, 3, 3, dtype=torch.bfloat16))
    assert seen == [1]
    handle.remove()
    model(torch.randn(2, 16, 3, 3, dtype=torch.bfloat16))
    assert seen == [1]
    assert silent(nn.Sequential(nn.BatchNorm2d(16, device="meta")))[0].weight.device.type == "meta"


def test_a_module_used_twice_and_a_root() -> None:
    norm = nn.BatchNorm1d(16)
    model = silent(nn.Sequential(norm, nn.Linear(16, 16), norm))
    assert model[0] is model[2]
    assert isinstance(silent(nn.BatchNorm1d(16)), nn.GroupNorm)


def test_a_shared_scale_is_not_folded_twice() -> None:
    a, b = trained(nn.BatchNorm1d(16)), trained(nn.BatchNorm1d(16))
    b.weight, b.bias = a.weight, a.bias
    before = a.weight.detach().clone()
    model = silent(nn.Sequential(a, b))
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, before)


def test_instance_norm_stops_tracking() -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    x = torch.randn(3, 4, 5, 5)
    assert "running_mean" in norm.state_dict()
    model = silent(nn.Sequential(norm))
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    assert silent(nn.InstanceNorm2d(4)).running_mean is None


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_few_channels_are_frozen_because_group_norm_would_erase_them(channels: int) -> None:
    norm = trained(nn.BatchNorm1d(channels))
    model = silent(nn.Sequential(norm))
    assert isinstance(model[0], FrozenBatchNorm)
    x = torch.randn(100, channels)
    erased = F.group_norm(x, 1)  # why: of one channel 0 is left, of two the sign
    assert channels > 2 or erased.abs().median().item() == pytest.approx(channels - 1, abs=0.01)
    assert (model.eval()(x) - model.train()(x)).abs().max() == 0
    with pytest.raises(ConfigurationError, match=r"'0' .*too few"):
        silent(nn.Sequential(nn.BatchNorm1d(channels, track_running_stats=False)))


def test_rows_without_positions_keep_their_variety() -> None:
    model = silent(nn.Sequential(nn.BatchNorm1d(64)))
    out = model(torch.randn(100, 64))
    assert model[0].num_groups == 4
    assert out.detach().std().item() == pytest.approx(1, abs=0.05)


def test_what_cannot_be_converted_is_named_and_nothing_is_changed() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(trained(nn.BatchNorm2d(16), 4, 4), Odd(16))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=r"'1' \(Odd\)"):
        silent(model)
    assert isinstance(model[0], nn.BatchNorm2d)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ConfigurationError, match="one batch"):
        silent(nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(ConfigurationError, match="no running statistics"):
        silent(nn.Sequential(nn.BatchNorm2d(16, track_running_stats=False)), batchnorm="frozen")
    assert isinstance(
        silent(nn.Sequential(nn.BatchNorm2d(16, track_running_stats=False)))[0], nn.GroupNorm
    )
    with pytest.raises(ConfigurationError, match="Did you mean 'frozen'"):
        silent(nn.Sequential(), batchnorm="frosen")
    with pytest.raises(ConfigurationError, match="group_size=1"):
        silent(nn.Sequential(), group_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", ["group", "frozen"])
def test_timm_norms_keep_their_activation(batchnorm: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("efficientnet_lite0", num_classes=3)
    names = {n for n, _ in model.named_parameters()}
    x = torch.randn(4, 3, 32, 32)
    expected = model.eval()(x)
    silent(model, batchnorm=batchnorm)
    assert {n for n, _ in model.named_parameters()} == names
    assert mixes(model, x) == ""
    assert any(isinstance(getattr(m, "act", None), nn.ReLU6) for m in model.modules())
    if batchnorm == "frozen":
        assert torch.equal(model.eval()(x), expected)


@pytest.mark.slow
def test_a_resnet_trains_after_preparation() -> None:
    torchvision = pytest.importorskip("torchvision")
    from dptorch.validation.gradient_check import check

    model = silent(torchvision.models.resnet18(num_classes=3))
    batch = torch.randn(4, 3, 32, 32), torch.randint(0, 3, (4,))
    report = check(model, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]), examples=2)
    assert report.ok, str(report)
