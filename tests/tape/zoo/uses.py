"""Ways of using layers: masks, loops, experts, in-place writes, custom functions."""

from typing import Any

import torch
import torch.nn.functional as F
from tests.tape.zoo.base import B, Case, Lambda, case, classes, labels, squares
from torch import Tensor, nn


@case
def heads_before_bodies() -> Case:
    model = Lambda(
        lambda m, x: m.head(F.relu(m.body(x))), head=nn.Linear(5, 3), body=nn.Linear(6, 5)
    )
    return Case(model, (torch.randn(B, 6), labels()), classes)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@case
def subclass_called_by_keyword() -> Case:
    model = Lambda(lambda m, x: m.a(input=m.b(input=x)), a=Doubled(5, 3), b=Doubled(6, 5))
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def module_skipped() -> Case:
    model = Lambda(lambda m, x: m.a(x), a=nn.Linear(6, 3), unused=nn.Linear(2, 2))
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def spectral_norm() -> Case:
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)
    ).eval()  # in training mode a power iteration moves the buffers between the loop's forwards
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def embedding_bags() -> Case:
    model = Lambda(
        lambda m, i, w: m.s(i, per_sample_weights=w) + m.m(i) + m.x(i),
        s=nn.EmbeddingBag(7, 4, mode="sum"),
        m=nn.EmbeddingBag(7, 4, mode="mean", padding_idx=2),
        x=nn.EmbeddingBag(7, 4, mode="max"),
    )
    ids = torch.tensor([[1, 1, 2, 5], [0, 3, 3, 3], [2, 2, 4, 1], [6, 0, 6, 5]])
    return Case(model, (ids, torch.randn(B, 4)), squares)


@case
def rows_one_by_one() -> Case:
    model = Lambda(
        lambda m, x: m.b(torch.stack([torch.tanh(m.a(x[i])) for i in range(x.shape[0])])),
        a=nn.Linear(6, 5), b=nn.Linear(5, 3),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def rows_written_one_by_one() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        z = x.new_zeros(x.shape[0], 5)
        for i in range(x.shape[0]):
            z[i] = torch.tanh(m.a(x[i]))
        return m.b(z)

    model = Lambda(run, a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def steps_written_one_by_one() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        z = torch.zeros(x.shape[0], x.shape[1], 5)
        for t in range(x.shape[1]):
            z[:, t] = m.a(x[:, t])
        parts = torch.zeros(x.shape[0], 4, 5)
        left = parts[:, :2]
        left.copy_(torch.tanh(z[:, :2]))
        parts.narrow(1, 2, 2).copy_(z[:, 1:])
        return m.b(parts)

    model = Lambda(run, a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    return Case(model, (torch.randn(B, 3, 6),), squares)


@case
def rows_reversed() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        turned = m.b(torch.tanh(m.a(x.flip(0))))
        return turned.flip(0) + m.a(x)[..., :1]

    model = Lambda(run, a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    return Case(model, (torch.randn(B, 3, 6),), squares)


@case
def masked_rows() -> Case:
    def run(m: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
        kept = m.n(torch.tanh(m.a(x[keep])))
        out = torch.zeros(*x.shape[:2], 5)
        out[keep] = kept
        return m.b(out)

    keep = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]]).bool()
    model = Lambda(run, a=nn.Linear(6, 5), b=nn.Linear(5, 3), n=nn.LayerNorm(5))
    return Case(model, (torch.randn(B, 3, 6), keep), squares)


@case
def mixture_of_experts() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = m.gate(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        hot = F.one_hot(chosen, 3).permute(2, 1, 0)
        for expert, layer in enumerate(m.experts):
            k, rows = torch.where(hot[expert])
            out.index_add_(0, rows, layer(flat[rows]) * weights[rows, k, None])
        return out.view_as(x)

    experts = nn.ModuleList(
        [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in "abc"]
    )
    model = Lambda(run, gate=nn.Linear(4, 3), experts=experts)
    return Case(model, (torch.randn(B, 3, 4),), squares)


@case
def two_views() -> Case:
    model = Lambda(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(6, 5), b=nn.Linear(5, 4))

    def loss(m: nn.Module, one: Tensor, two: Tensor) -> Tensor:
        return 2 - 2 * F.cosine_similarity(m(one), m(two), dim=-1)

    return Case(model, (torch.randn(B, 6), torch.randn(B, 6)), loss)


@case
def parameters_in_place() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        h.addmm_(x, m.w)
        h[:, :2] += m.s
        h.copy_(h.clone() * m.t)
        buffer = torch.zeros_like(h)
        buffer.copy_(m.t)
        return (h + buffer).masked_fill(x[:, :5] > 1, 0.5).masked_fill(x[:, :5] < -1, m.f)

    model = Lambda(
        run, a=nn.Linear(6, 5), w=torch.randn(6, 5), s=torch.randn(2), t=torch.randn(5),
        f=torch.randn(()),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 6),), squares)


@case
def clamped_by_parameters() -> Case:
    model = Lambda(
        lambda m, x: torch.clamp(m.a(x), min=m.low, max=m.high) + torch.atan2(x[:, :5], m.high),
        a=nn.Linear(6, 5), low=torch.full((5,), -0.5), high=torch.full((5,), 0.5),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 6),), squares)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] * w, (grads[0] * x).sum_to_size(w.shape)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return -grads[0]


class Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


@case
def custom_functions() -> Case:
    model = Lambda(
        lambda m, x: m.b(Pass.apply(Reverse.apply(torch.tanh(Scale.apply(m.a(x), m.w))))),
        a=nn.Linear(6, 5), w=torch.randn(5), b=nn.Linear(5, 3),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def hooked_modules() -> Case:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[1].register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
    model[0].register_forward_hook(lambda module, into, out: out * 2)
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def repeated_and_interleaved() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        more = m.a(x.repeat_interleave(2, 0)).view(x.shape[0], 2, -1).mean(1)
        again = m.a(x.repeat(3, 1)).view(3, x.shape[0], -1).sum(0)
        return m.b(more + again)

    model = Lambda(run, a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def attack_inside() -> Case:
    """A model whose forward moves its input along the gradient of a score."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        moved = x.detach().requires_grad_()
        g = torch.autograd.grad(m.a(moved).square().sum(), moved)[0]
        return m.b(torch.tanh(m.a(x + 0.1 * g.sign())))

    model = Lambda(run, a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def losses_of_all_kinds() -> Case:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def loss(m: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = m(x)
        return sum(  # type: ignore[return-value]
            one.flatten(1).mean(1) if one.dim() > 1 else one
            for one in (
                F.mse_loss(out, t, reduction="none"),
                F.smooth_l1_loss(out, t, reduction="none"),
                F.huber_loss(out, t, "none"),
                F.binary_cross_entropy_with_logits(out, t.sigmoid(), reduction="none"),
                F.kl_div(out.log_softmax(-1), t.softmax(-1), reduction="none"),
                F.multi_margin_loss(out, y, reduction="none"),
                F.gaussian_nll_loss(out, t, t.square() + 1, reduction="none"),
                F.cosine_embedding_loss(out, t, y.sign() * 2 - 1, reduction="none"),
                F.triplet_margin_loss(out, t, x[:, :3], reduction="none"),
                F.cross_entropy(out, t.softmax(-1), reduction="none"),
            )
        )

    return Case(model, (torch.randn(B, 6), torch.randn(B, 3), labels()), loss)
