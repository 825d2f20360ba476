"""Layers and uses of them: linear in every spelling, parameters that broadcast, convolutions."""

import torch
import torch.nn.functional as F
from tests.tape.zoo.base import B, Case, Lambda, case, classes, labels, squares
from torch import Tensor, nn


@case
def mlp() -> Case:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    return Case(model, (torch.randn(B, 6), labels()), classes)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(2, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(2, outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.skip(x)
        return F.relu(out, inplace=True)


@case
def resnet_groupnorm() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1),
        Block(4, 4, 1),
        Block(4, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return Case(model, (torch.randn(B, 3, 8, 8), labels()), classes)


@case
def layer_used_twice() -> Case:
    model = Lambda(
        lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 3),
    )
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def functional_tied_head() -> Case:
    model = Lambda(
        lambda m, i: F.linear(torch.tanh(m.l(m.e(i))), m.e.weight),
        e=nn.Embedding(11, 6),
        l=nn.Linear(6, 6),
    )

    def loss(m: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(m(ids).transpose(1, 2), ids, reduction="none").sum(1)

    return Case(model, (torch.randint(0, 11, (B, 5)),), loss)


# -- linear in every spelling ----------------------------------------------------------------------


@case
def raw_matmuls() -> Case:
    model = Lambda(
        lambda m, x: torch.tanh(m.u @ torch.tanh(x @ m.w)) @ m.v.T + m.c,
        w=torch.randn(6, 5), u=torch.randn(4, 7), v=torch.randn(3, 5), c=torch.randn(3),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 7, 6),), squares)


@case
def matrix_vector() -> Case:
    model = Lambda(lambda m, x: torch.tanh(x @ m.w) @ m.v, w=torch.randn(6, 5), v=torch.randn(5))
    return Case(model, (torch.randn(B, 3, 6),), squares)


@case
def einsum_heads() -> Case:
    model = Lambda(
        lambda m, x: torch.einsum("bthe,hed->btd", torch.einsum("btd,dhe->bthe", x, m.w), m.o),
        w=torch.randn(6, 2, 3), o=torch.randn(2, 3, 6),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 5, 6),), squares)


@case
def einsum_experts() -> Case:
    model = Lambda(lambda m, x: torch.einsum("bed,efd->bef", x, m.w).tanh(), w=torch.randn(3, 4, 6))
    return Case(model, (torch.randn(B, 3, 6),), squares)


@case
def token_mixing() -> Case:
    model = Lambda(
        lambda m, x: m.t(x.transpose(1, 2)).transpose(1, 2) + m.c(x),
        t=nn.Linear(5, 5), c=nn.Linear(6, 6),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 5, 6),), squares)


@case
def five_dimensional_linear() -> Case:
    return Case(nn.Linear(4, 3), (torch.randn(B, 2, 3, 2, 4),), squares)


@case
def linear_by_a_vector() -> Case:
    model = Lambda(
        lambda m, x: m.b(F.linear(torch.tanh(m.a(x)), torch.linspace(1, 2, 5)))
        + F.linear(x[:, :2], m.v),
        a=nn.Linear(4, 5), b=nn.Linear(3, 2), v=torch.randn(4),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 3, 4),), squares)


@case
def one_feature_vector() -> Case:
    model = Lambda(lambda m, x: m.a(x[:, None] * m.s), a=nn.Linear(1, 3), s=torch.randn(1))
    return Case(model, (torch.randn(B),), squares)


@case
def bilinear() -> Case:
    model = Lambda(lambda m, x, y: m.b(x, y), b=nn.Bilinear(4, 5, 3))
    return Case(model, (torch.randn(B, 4), torch.randn(B, 5)), squares)


# -- parameters that broadcast ---------------------------------------------------------------------


@case
def class_token_and_positions() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1) + m.pos
        x = x + m.gamma * m.l(m.n(x))
        x += m.gamma
        return x * m.scalar

    model = Lambda(
        run, cls=torch.randn(1, 1, 6), pos=torch.randn(1, 6, 6), gamma=torch.randn(6),
        scalar=torch.randn(()), l=nn.Linear(6, 6), n=nn.LayerNorm(6),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 5, 6),), squares)


@case
def position_table() -> Case:
    model = Lambda(
        lambda m, i: torch.tanh(m.e(i) + m.p(torch.arange(i.shape[1]))) * m.p.weight[0],
        e=nn.Embedding(11, 6, padding_idx=0), p=nn.Embedding(9, 6),
    )  # fmt: skip
    return Case(model, (torch.randint(0, 11, (B, 5)),), squares)


@case
def ids_without_positions() -> Case:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 3))
    return Case(model, (torch.randint(0, 7, (B,)), labels()), classes)


@case
def assigned_and_masked() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = m.first
        return torch.where(x > 0, x, m.low) @ m.w

    model = Lambda(run, first=torch.randn(6), low=torch.randn(6), w=torch.randn(6, 2))
    return Case(model, (torch.randn(B, 5, 6),), squares)


# -- convolutions and normalisation ----------------------------------------------------------------


@case
def convolutions_2d() -> Case:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same", groups=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, dilation=2, padding_mode="circular"),
        nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1, groups=2),
        nn.InstanceNorm2d(6, affine=True),
        nn.Conv2d(6, 6, (2, 3), padding="same", groups=6),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    return Case(model, (torch.randn(B, 4, 8, 8), labels()), classes)


@case
def convolutions_1d_3d() -> Case:
    model = Lambda(
        lambda m, x: m.c(m.b(m.a(x)).unflatten(2, (2, 2, -1))),
        a=nn.Conv1d(3, 4, 3, padding=2, dilation=2),
        b=nn.ConvTranspose1d(4, 2, 2, stride=1),
        c=nn.Conv3d(2, 3, (1, 2, 2), groups=1),
    )
    return Case(model, (torch.randn(B, 3, 11),), squares)


@case
def frames_folded_into_the_batch() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        return m.h(m.n(m.c(x.flatten(0, 1))).mean((2, 3)).view(b, t, -1))

    model = Lambda(run, c=nn.Conv2d(3, 4, 3), n=nn.GroupNorm(2, 4), h=nn.Linear(4, 2))
    return Case(model, (torch.randn(B, 3, 3, 6, 6),), squares)


@case
def norms_of_all_kinds() -> Case:
    frozen = nn.BatchNorm2d(4).eval()
    frozen.running_mean.normal_()
    model = Lambda(
        lambda m, x: m.r(m.l(m.f(x))),
        f=frozen, l=nn.LayerNorm([4, 5, 6], bias=False), r=nn.RMSNorm(6),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 4, 5, 6),), squares)


@case
def channels_last() -> Case:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(B, 4, 6, 6).to(memory_format=torch.channels_last)
    return Case(model, (x, labels()), classes)


@case
def prelu_and_weight_norm() -> Case:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
        nn.PReLU(5),
        nn.Linear(5, 3),
    )
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def frozen_but_biases() -> Case:
    base = mlp()
    for name, p in base.model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return base
