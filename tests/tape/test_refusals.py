"""What has no per-example gradient, or hides it, is refused by name, never silently accepted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.loop import one_example_loop, relative_error
from tests.tape.zoo.base import Lambda
from torch import Tensor, nn

import dptorch
from dptorch.errors import ConfigurationError, ExamplesMixError, NotCoveredError

B, D = 4, 6


pytestmark = pytest.mark.usefixtures("float64")


def run(model: nn.Module, loss: Callable[[Any], Tensor] | None = None, *batch: Tensor) -> None:
    """One recorded step, everything asked of its tape."""
    batch = batch or (torch.randn(B, D),)
    with dptorch.record(model) as tape:
        out = model(*batch)
        value = (loss or (lambda o: o.square().sum()))(out)
    value.backward()
    tape.norms()
    tape.clipped_sum(torch.ones(tape.batch_size))


def layers(function: Callable[..., Tensor], **parts: Any) -> nn.Module:
    return Lambda(function, a=nn.Linear(D, D), b=nn.Linear(D, D), **parts)


def test_batch_norm_in_training_mode_is_named() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
    with pytest.raises(ExamplesMixError, match=r"module '1' \(BatchNorm1d\).*prepare"):
        run(model)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("examples", [1, B])
def test_batch_norm_without_scale_or_with_one_example(affine: bool, examples: int) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm2d(D, affine=affine), nn.Conv2d(D, 2, 1))
    model[0] = nn.Conv2d(D, D, 1)
    with pytest.raises(ExamplesMixError, match="BatchNorm"):
        run(model, None, torch.randn(examples, D, 3, 3))


def test_instance_norm_with_running_statistics() -> None:
    for affine in (True, False):
        norm = nn.InstanceNorm1d(D, track_running_stats=True, affine=affine)
        with pytest.raises(ExamplesMixError, match="running statistics"):
            run(
                nn.Sequential(nn.Conv1d(D, D, 1), norm, nn.Conv1d(D, D, 1)),
                None,
                torch.randn(B, D, 3),
            )


def grad_free(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor) -> Tensor:
        with torch.no_grad():
            return function(x)

    return inner


def through_numpy_like_copy(x: Tensor) -> Tensor:
    return torch.tensor(x.mean(0))


def into_memory(x: Tensor) -> Tensor:
    memory = torch.zeros(D)
    memory[:].copy_(x.detach().mean(0))
    return memory


def into_out(x: Tensor) -> Tensor:
    memory = torch.zeros(D)
    torch.mean(x.detach(), 0, out=memory)
    return memory


def into_data(x: Tensor) -> Tensor:
    memory = torch.zeros(D)
    memory.data = x.detach().mean(0)
    return memory


def into_parameter(x: Tensor) -> Tensor:
    return nn.Parameter(x.detach().mean(0))


def into_foreach(x: Tensor) -> Tensor:
    memory = torch.zeros(D)
    torch._foreach_add_([memory], [x.detach().mean(0)])
    return memory


def into_indices(x: Tensor) -> Tensor:
    memory = torch.zeros(D)
    memory[torch.arange(D)] = x.detach().mean(0)
    return memory


CENTRES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(0),
    "detached mean": lambda x: x.mean(0).detach(),
    "mean without gradients": grad_free(lambda x: x.mean(0)),
    "keepdim": lambda x: x.mean(0, keepdim=True),
    "max": lambda x: x.amax(0),
    "median": lambda x: x.median(0).values.detach(),
    "first example": lambda x: x[:1],
    "first example expanded": lambda x: x[0].detach().expand(x.shape),
    "rolled": lambda x: x.roll(1, 0),
    "rolled, detached": lambda x: x.detach().roll(1, 0),
    "sorted": lambda x: x.sort(0).values,
    "ranks": lambda x: x.argsort(0).argsort(0).double(),
    "top": lambda x: x.topk(2, 0).values.mean(0),
    "cumulated": lambda x: x.cumsum(0),
    "differences": lambda x: F.pad(torch.diff(x, 1, 0), (0, 0, 1, 0)),
    "softmax over examples": lambda x: x.softmax(0),
    "softmax of rank 3 without a dimension": lambda x: F.softmax(x[:, None])[:, 0],
    "fourier transform over examples": lambda x: torch.fft.fft(x, None, 0).real,
    "quantile": lambda x: torch.quantile(x, torch.rand(B), dim=0)[0],
    "quantiles of rows, misread": lambda x: torch.quantile(x, torch.rand(B), dim=1)[:, :1],
    "gram matrix": lambda x: (x @ x.T) @ torch.randn(B, D),
    "detached gram": lambda x: x.detach() @ x.detach().T @ x,
    "einsum over examples": lambda x: torch.einsum("bd,bd->d", x, x),
    "batched sum of products": lambda x: torch.addbmm(
        torch.zeros(D, D), x[:, :, None], x[:, None, :]
    )[:1],
    "flipped mask": lambda x: torch.where((x > 0).flip(0), x, 0.0),
    "rows kept by another's mask": lambda x: torch.cat([x[(x[:, 0] > 0).flip(0)], x])[:B],
    "copy": through_numpy_like_copy,
    "view of a buffer": into_memory,
    "out=": into_out,
    "data": into_data,
    "new parameter": into_parameter,
    "foreach": into_foreach,
    "index assignment": into_indices,
    "storage": lambda x: torch.empty(0).set_(x.detach().flip(0).contiguous()),
    "list": lambda x: torch.stack(list(x.detach())).mean(0),
    "view that crosses rows": lambda x: x.reshape(D, B).t(),
    "images taken for channels": lambda x: F.pixel_shuffle(x.view(4, 3, 2), 2).reshape(-1)[:D],
    "unfolded without a batch": lambda x: F.unfold(x.view(B, 2, 3), (1, 1)).reshape(B, D).flip(0),
    "dynamic convolution": lambda x: F.conv1d(x[:, :, None], x[:, :, None]).flatten(1).mean(1)[:, None],
    "strided": lambda x: torch.as_strided(x, (B, D), (1, B)),
    "windows that end in the next row": lambda x: F.pad(
        x, (0, 1, 0, 1)).as_strided((B, 2, D), (D + 1, 2, 1)).sum(1),
    "windows over gaps": lambda x: x.repeat(1, 2)[:, ::2].as_strided((B, D), (2 * D, 1)),
    "boolean any": lambda x: (x > 1).any(0).double(),
    "nonzero count": lambda x: torch.full((D,), (x > 0).sum() * 1.0),
    "attention over examples": lambda x: F.scaled_dot_product_attention(x, x, x),
    "position among the selected": lambda x: _scatter_back(x),
}  # fmt: skip


def _scatter_back(x: Tensor) -> Tensor:
    """Each kept example learns how many were kept before it."""
    kept = x[:, 0] > x[:, 0].min().item()
    rows = x[kept] * torch.arange(1.0, B)[:, None]
    out = torch.zeros_like(x)
    out[kept] = rows
    return out


@pytest.mark.parametrize("where", ["of the input", "of activations"])
@pytest.mark.parametrize("name", CENTRES)
def test_a_model_that_mixes_its_examples_is_refused(name: str, where: str) -> None:
    centre = CENTRES[name]
    if where == "of the input":
        model = layers(lambda m, x: m.b(torch.tanh(m.a(x - centre(x)))))
    else:
        model = layers(lambda m, x: m.b((lambda h: torch.tanh(h - centre(h)))(m.a(x))))
    with pytest.raises((ExamplesMixError, NotCoveredError)):
        run(model)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o: F.cross_entropy(o @ o.T, torch.arange(B)),
        lambda o: F.cross_entropy(o @ o.detach().T, torch.arange(B)),
        lambda o: o.square().sum().exp(),
        lambda o: 1.0 / o.square().sum(),
        lambda o: o.square().sum() / o.detach().square().sum(),
        lambda o: o.square().mean().sqrt(),
        lambda o: o.mean() * o.sum(),
        lambda o: torch.logsumexp(o, 0).sum(),
        lambda o: o.std(),
        lambda o: o.norm(),
        lambda o: (o.softmax(-1).mean(0) ** 2).sum(),  # a load-balancing loss
        lambda o: torch.cdist(o, o).sum(),
        lambda o: o.square().sum(1).max(),
        lambda o: o.square().sum(1).topk(2).values.sum(),
        lambda o: o.square().sum() + o.square().mean(),
    ],
)
def test_a_loss_that_mixes_examples_is_refused(loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ExamplesMixError):
        run(nn.Linear(D, D), loss)


def test_clip_loss_is_refused_by_name() -> None:
    model = layers(lambda m, x: m.a(x) @ m.b(x).t())
    with pytest.raises(ExamplesMixError, match="matmul"):
        run(model, lambda o: F.cross_entropy(o, torch.arange(B)))


def test_parameter_used_outside_the_model() -> None:
    model, x = layers(lambda m, x: m.a(x)), torch.randn(B, D)
    with dptorch.record(model):
        model(x)
    with pytest.raises(NotCoveredError, match=r"weight_decay"):
        run(model, lambda o: o.square().sum() + 0.1 * model.a.weight.square().sum())
    with dptorch.record(model):
        value = model(x).square().sum()
    with pytest.raises(NotCoveredError, match=r"'b.weight'|'a.weight'"):
        (value + model.a.weight.square().sum() + model.b.weight.sum()).backward()


def test_script_modules_are_refused() -> None:
    model = nn.Sequential(nn.Linear(D, D), torch.jit.script(nn.Linear(D, D)), nn.Linear(D, D))
    with pytest.raises(NotCoveredError):
        run(model)


def test_vmap_over_examples_is_refused() -> None:
    model = layers(lambda m, x: torch.vmap(lambda row: m.a(row))(x))
    with pytest.raises(NotCoveredError, match="vmap"):
        run(model)


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, D)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        out = h if self.kept is None else h + self.kept
        self.kept = h if self.mode == "graph" else h.detach()  # type: ignore[has-type]
        return out


@pytest.mark.parametrize("mode", ["graph", "values"])
def test_tensors_kept_from_an_earlier_step_are_refused(mode: str) -> None:
    model = Keeps()
    model.mode = mode
    run(model)
    with pytest.raises(ExamplesMixError, match=r"another forward pass|earlier step"):
        run(model)


class Running(nn.Module):
    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(D, D)
        self.register_buffer("mean", torch.zeros(D))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x - self.mean)
        with torch.no_grad():
            self.write(self.mean, x)
        return out


@pytest.mark.parametrize(
    "write",
    [
        lambda mean, x: mean.mul_(0.9).add_(x.mean(0), alpha=0.1),
        lambda mean, x: mean.copy_(x[0]),
        lambda mean, x: mean.lerp_(x.mean(0), 0.1),
        lambda mean, x: mean[:3].copy_(x[0, :3]),
        lambda mean, x: mean.__setitem__(slice(0, 2), x[0, :2]),
        lambda mean, x: torch.mean(x, 0, out=mean),
        lambda mean, x: setattr(mean, "data", x.mean(0)),
    ],
)
def test_running_statistics_are_refused(write: Callable[[Tensor, Tensor], Any]) -> None:
    model = Running(write)
    with pytest.raises((NotCoveredError, ExamplesMixError)):
        twice(model)


def twice(model: nn.Module) -> None:
    run(model)
    run(model)


def test_counters_are_no_statistics() -> None:
    model = Running(lambda mean, x: mean.add_(1))
    run(model)
    assert torch.equal(model.mean, torch.ones(D))


def test_examples_written_into_a_parameter() -> None:
    model = layers(lambda m, x: (m.a.weight.data.copy_(x.mean(0).expand(D, D)), m.a(x))[1])
    with pytest.raises((NotCoveredError, ExamplesMixError)):
        run(model)


def test_embedding_max_norm() -> None:
    model = nn.Sequential(nn.Embedding(7, D, max_norm=1.0), nn.Linear(D, D))
    with pytest.raises(NotCoveredError, match="max_norm"):
        run(model, None, torch.randint(0, 7, (B, 3)))
    model = nn.Sequential(nn.Embedding(7, D, scale_grad_by_freq=True), nn.Linear(D, D))
    with pytest.raises(NotCoveredError, match="scale_grad_by_freq"):
        run(model, None, torch.randint(0, 7, (B, 3)))


def test_inputs_of_different_batch_sizes() -> None:
    model = layers(lambda m, x, y: m.a(x) + m.b(y))
    with pytest.raises(ConfigurationError, match="batch_dims"):
        run(model, None, torch.randn(B, D), torch.randn(B + 1, D))


def test_second_derivatives_are_refused() -> None:
    def penalised(m: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = m.a(x).square()
        g = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
        return out + g

    with pytest.raises(NotCoveredError, match="second derivative"):
        run(layers(penalised))
    model = nn.Linear(D, D)
    with dptorch.record(model):
        loss = model(torch.randn(B, D)).square().sum()
    with pytest.raises(NotCoveredError, match="second derivative"):
        loss.backward(create_graph=True)


def test_a_hook_that_mixes_gradients_is_refused() -> None:
    def hooked(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        h.register_hook(lambda g: g - g.mean(0))
        return m.b(h)

    with pytest.raises(ExamplesMixError, match="hook"):
        run(layers(hooked))


def test_out_with_a_parameter_is_refused() -> None:
    model = layers(lambda m, x: torch.matmul(x, m.a.weight, out=torch.zeros(B, D)) + m.b(x))
    with pytest.raises(NotCoveredError, match="out="):
        run(model)


def test_an_unknown_op_names_parameter_op_module_and_way_out() -> None:
    inner = Lambda(lambda m, x: _weighed(x, m.w), w=torch.randn(D))
    model = nn.Sequential(nn.Linear(D, D), inner)
    named = r"module '1'.*parameter '1.w'.*'dptorch_tests::weighed'.*rowwise"
    with pytest.raises(NotCoveredError, match=named):
        run(model)


@torch.library.custom_op("dptorch_tests::weighed", mutates_args=())
def _weighed(x: Tensor, w: Tensor) -> Tensor:
    """An operator that torch cannot take apart."""
    return x * w


_weighed.register_autograd(lambda ctx, g: (g, g.sum(0)))


def test_a_library_function_is_not_taken_for_its_namesake_in_torch() -> None:
    def sigmoid(x: Tensor) -> Tensor:  # mixes, under the name of an op that does not
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(sigmoid, (x,), x)
        return x - x.mean(0)

    with pytest.raises(ExamplesMixError):
        run(layers(lambda m, x: m.b(sigmoid(m.a(x)))))


def test_examples_of_another_recording() -> None:
    one, two = nn.Linear(D, D), nn.Linear(D, D)
    x = torch.randn(B, D)
    with dptorch.record(one):
        h = one(x).detach()
    model = layers(lambda m, y: m.a(y + h))
    with pytest.raises(ExamplesMixError, match="another forward pass"):
        run(model, None, torch.randn(B, D))
    run(two, None, h)  # as an argument it is an input like any other


def test_the_same_input_object_may_come_again() -> None:
    model, x = nn.Linear(D, D), torch.randn(B, D)
    for _ in range(2):
        with dptorch.record(model) as tape:
            loss = F.mse_loss(model(x), x)
        loss.backward()
        assert tape.norms().shape == (B,)


@pytest.mark.parametrize(
    "swap",
    [
        lambda h: setattr(h, "data", h.data.flip(0)),
        lambda h: h.detach().copy_(h.detach().flip(0)),
        lambda h: h.data.copy_(h.data.roll(1, 0)),
        lambda h: h[0].copy_(h.detach()[1]),
        lambda h: h.__setitem__(0, h[1].clone()),
        lambda h: h[:, 0].copy_(h[:, 1].mean()),
    ],
)
def test_rows_swapped_in_place_are_refused(swap: Callable[[Tensor], Any]) -> None:
    """Autograd would send an example's gradient to the activations that another one had."""

    def swapped(m: nn.Module, x: Tensor) -> Tensor:
        h = 1 * m.a(x)
        swap(h)
        return m.b(h)

    with pytest.raises((ExamplesMixError, NotCoveredError)):
        run(layers(swapped))


def test_examples_written_at_an_offset_keep_their_owners() -> None:
    """Rows 2 to 5 of a buffer belong to examples 0 to 3, not to 2, 3, 0 and 1."""

    def run_model(m: nn.Module, x: Tensor) -> Tensor:
        z = torch.zeros(2 * x.shape[0] + 2, D)
        z[2 : 2 + x.shape[0]] = m.a(x)
        return m.b(z[2 : 2 + x.shape[0]])

    model, x = layers(run_model), torch.randn(B, D)
    expected = one_example_loop(model, (x,), lambda m, x: m(x).square().sum(1))
    with dptorch.record(model) as tape:
        loss = model(x).square().sum()
    loss.backward()
    for name, gradient in tape.per_example_gradients().items():
        assert relative_error(gradient, expected[name]) <= 1e-9
