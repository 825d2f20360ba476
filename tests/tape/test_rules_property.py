"""Each rule on random shapes, batch positions and settings, against the loop, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.oracles.loop import one_example_loop, relative_error
from tests.tape.properties import check, convolution, weighed
from tests.tape.zoo.base import Lambda
from torch import Tensor, nn

some = settings(
    max_examples=min(25, settings.default.max_examples),  # fewer under `make quick`
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
small = st.integers(1, 4)
batches = st.integers(1, 4)


pytestmark = pytest.mark.usefixtures("float64")


def shapes(lead: int, *, least: int = 0) -> st.SearchStrategy[list[int]]:
    return st.lists(small, min_size=least, max_size=lead)


@some
@given(batches, shapes(3), small, small, st.booleans(), st.integers(0, 3), st.booleans())
def test_linear(b: int, lead: list[int], d: int, p: int, bias: bool, move: int, fold: bool) -> None:
    torch.manual_seed(b + d)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        if fold and lead:  # positions folded into the batch dimension
            return m.a(x.flatten(0, 1)).view(*x.shape[:-1], p)
        at = min(move, x.dim() - 2)
        return m.a(x.movedim(0, at)).movedim(at, 0)

    check(Lambda(run, a=nn.Linear(d, p, bias=bias)), torch.randn(b, *lead, d))


@some
@given(batches, small, small, small, small, st.sampled_from(["left", "right", "both", "bmm", "mv"]))
def test_matmul(b: int, n: int, t: int, d: int, p: int, kind: str) -> None:
    torch.manual_seed(b + d)
    x = torch.randn(b, n, t, d)
    function, w = {
        "right": (lambda m, x: x @ m.w, torch.randn(d, p)),
        "left": (lambda m, x: m.w @ x, torch.randn(p, t)),
        "both": (lambda m, x: x @ m.w, torch.randn(n, d, p)),
        "bmm": (lambda m, x: (x[:, 0].transpose(0, 1) @ m.w).transpose(0, 1), torch.randn(t, d, p)),
        "mv": (lambda m, x: x @ m.w, torch.randn(d)),
    }[kind]  # fmt: skip
    check(Lambda(function, w=w), x)


@some
@given(
    batches,
    st.sampled_from(
        ["bij,jk->bik", "bij,kj->bik", "bij,jkl->bikl", "bij,ijk->bik", "bij,ik->bjk", "bij,ij->b",
         "jib,jk->ikb", "bij,k->bijk", "...ij,jk->...ik", "bij,jk", "bii,ik->bk"]
    ),
    small, small, small,
)  # fmt: skip
def test_einsum(b: int, equation: str, i: int, j: int, k: int) -> None:
    torch.manual_seed(b + i)
    sizes = {"b": b, "i": i, "j": j, "k": k, "l": 2}
    left, right = equation.split("->")[0].split(",")
    x = torch.randn([sizes[c] for c in left.replace("...", "b")])
    w = torch.randn([sizes[c] for c in right])
    dim = left.replace("...", "b").index("b")
    result = equation.split("->")[1] if "->" in equation else "bik"
    to = result.replace("...", "b").index("b")

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return torch.einsum(equation, x.movedim(0, dim), m.w).movedim(to, 0)

    check(Lambda(run, w=w), x.movedim(dim, 0))


@some
@given(batches, st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_convolutions(
    b: int, rank: int, transposed: bool, fold: bool, bias: bool, data: st.DataObject
) -> None:
    torch.manual_seed(b + rank)
    layer, shape = convolution(rank, transposed, bias, data)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        out = m.c(x.flatten(0, 1) if fold else x[:, 0])
        return out.unflatten(0, (x.shape[0], -1))

    check(Lambda(run, c=layer), torch.randn(b, 2 if fold else 1, *shape))


@some
@given(batches, shapes(2), st.sampled_from([None, 0, 2]), st.booleans(), st.booleans())
def test_embeddings(b: int, lead: list[int], padding: int | None, tied: bool, turned: bool) -> None:
    torch.manual_seed(b + len(lead))
    table = nn.Embedding(5, 3, padding_idx=padding)

    def run(m: nn.Module, ids: Tensor) -> Tensor:
        h = m.e(ids.movedim(0, -1)).movedim(-2, 0) if turned else m.e(ids)
        return F.linear(torch.tanh(h), m.e.weight) if tied else h

    check(Lambda(run, e=table), torch.randint(0, 5, (b, *lead)))


@some
@given(
    batches, small, st.lists(st.integers(2, 4), min_size=0, max_size=2), st.booleans(), st.data()
)
def test_normalisation(
    b: int, groups: int, space: list[int], fold: bool, data: st.DataObject
) -> None:
    torch.manual_seed(b + groups)
    channels = 2 * groups
    eps = data.draw(st.sampled_from([1e-5, 1e-2]))
    frozen = nn.BatchNorm2d(channels, eps=eps).eval()
    frozen.running_mean.normal_()
    frozen.running_var.uniform_(0.5, 2)
    whole = [channels, *space, 2]
    kinds = {
        "group": nn.GroupNorm(groups, channels, eps=eps),
        "layer": nn.LayerNorm(whole[data.draw(st.integers(0, len(whole) - 1)) :], eps=eps),
        "rms": nn.RMSNorm(2, eps=data.draw(st.sampled_from([None, eps]))),
        "batch": frozen if len(space) == 1 else nn.GroupNorm(1, channels),
        "instance": nn.InstanceNorm2d(channels, affine=True) if len(space) == 1 else nn.Identity(),
    }
    norm = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    for p in norm.parameters():
        nn.init.normal_(p)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        out = m.n(x.flatten(0, 1) if fold else x[:, 0])
        return out.unflatten(0, (x.shape[0], -1)) * m.s

    check(Lambda(run, n=norm, s=torch.randn(())), torch.randn(b, 2 if fold else 1, *whole))


@some
@given(batches, st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_broadcast_parameters(b: int, shape: list[int], data: st.DataObject) -> None:
    torch.manual_seed(b + len(shape))
    own = [n if data.draw(st.booleans()) else 1 for n in shape][
        data.draw(st.integers(0, len(shape))) :
    ]
    p, q = torch.rand(own) + 0.5, torch.randn(own)
    op = data.draw(
        st.sampled_from(
            [
                lambda m, x: x + m.p,
                lambda m, x: m.p - x,
                lambda m, x: x * m.p / m.q.exp(),
                lambda m, x: x.clone().mul_(m.p).add_(m.q, alpha=0.3),
                lambda m, x: torch.where(x > 0, x * m.p, m.q),
                lambda m, x: torch.lerp(x, m.q, m.p),
                lambda m, x: torch.addcmul(x, x, m.p, value=0.5),
                lambda m, x: torch.maximum(x, m.q).pow(2) * m.p,
                lambda m, x: torch.clamp(x, min=m.q, max=m.p + 2),
                lambda m, x: (x.abs() + 0.1).pow(m.p) + m.q,
                lambda m, x: x * m.p.expand_as(x) + m.q.expand(x.shape),
                lambda m, x: torch.stack([x, m.q.expand_as(x)], 1) * m.p,
                lambda m, x: torch.cat([x, m.q.expand_as(x)], -1).sum(-1) * m.p.sum(),
            ]
        )
    )
    check(Lambda(op, p=p, q=q), torch.randn(b, *shape))


MOVES = ["permute", "fold", "flip", "roll", "index", "chunk", "repeat", "none", "select"]


@some
@given(st.integers(2, 4), st.permutations(range(4)), st.data())
def test_linear_behind_data_movement(b: int, order: list[int], data: st.DataObject) -> None:
    """Random chains of views, permutations, splits and indexing keep track of the examples."""
    torch.manual_seed(b)
    x = torch.randn(b, 2, 3, 4)
    steps = data.draw(
        st.lists(
            st.sampled_from(MOVES),
            max_size=4,
        )
    )  # fmt: skip

    def run(m: nn.Module, x: Tensor) -> Tensor:
        n = x.shape[0]
        total = x.new_zeros(n)
        h, at = x, 0  # the batch is whole in dimension `at`
        for step in steps:
            if step == "permute":
                cycle = [*range(1, h.dim()), 0]
                h, at = h.permute(cycle), cycle.index(at)
            elif step == "flip":
                h = h.flip(-1, 0) if at not in (0, h.dim() - 1) else h
            elif step == "roll":
                h = h.roll(1, (at + 1) % h.dim())
            elif step == "index" and at > 0:
                h = h[torch.arange(h.shape[0] - 1, -1, -1)]
            elif step == "chunk" and at != 1 and h.shape[1] > 1:
                h = torch.cat(h.chunk(2, 1)[::-1], 1)
            elif step == "none":
                h, at = h[None, ..., None], at + 1
            elif step == "repeat":
                h = h.repeat_interleave(2, (at + 1) % h.dim())
            elif step == "select" and at > 0:
                h, at = h.select(0, -1), at - 1
            elif step == "fold" and at + 1 < h.dim():
                shape = h.shape
                folded = h.flatten(at, at + 1)
                h = torch.tanh(m.s * folded.movedim(at, 0)).movedim(0, at).reshape(shape)
        h = h.movedim(at, 0).reshape(n, -1)
        total = total + m.a(h.unsqueeze(-1)).flatten(1).sum(1)
        return torch.stack([total, total.square()], 1)

    check(Lambda(run, a=nn.Linear(1, 2), s=torch.randn(1)), x)


@some
@given(
    batches,
    st.sampled_from(["LSTM", "GRU", "RNN"]),
    st.booleans(),
    st.integers(1, 2),
    st.booleans(),
)
def test_recurrent(b: int, kind: str, first: bool, count: int, both: bool) -> None:
    torch.manual_seed(b + count)
    layer = getattr(nn, kind)(3, 2, count, batch_first=first, bidirectional=both)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        out = m.r(x if first else x.transpose(0, 1))[0]
        return out if first else out.transpose(0, 1)

    check(Lambda(run, r=layer), torch.randn(b, 4, 3))


@some
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_attention_with_a_bias(b: int, heads: int, t: int, folded: bool) -> None:
    torch.manual_seed(b + t)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (heads, 2)).transpose(1, 2)
        if folded:
            q = q.flatten(0, 1)
            bias = m.bias[:1, 0].expand(q.shape[0], -1, -1)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).view(x.shape[0], -1)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=m.bias).flatten(1)

    check(Lambda(run, bias=torch.randn(1, heads, t, t)), torch.randn(b, t, heads * 2))


@some
@given(batches, small, small, small, st.booleans())
def test_bilinear_and_prelu(b: int, t: int, d: int, p: int, one: bool) -> None:
    torch.manual_seed(b + d)
    model = Lambda(
        lambda m, x, y: m.r(m.b(x, y).transpose(1, 2)),
        b=nn.Bilinear(d, p, 3, bias=one), r=nn.PReLU(1 if one else 3),
    )  # fmt: skip
    check(model, torch.randn(b, t, d), torch.randn(b, t, p))


@some
@given(
    batches, st.integers(1, 4), st.sampled_from(["sum", "mean", "max"]), st.sampled_from([None, 1])
)
def test_embedding_bag(b: int, n: int, mode: str, padding: int | None) -> None:
    torch.manual_seed(b + n)
    model = nn.EmbeddingBag(5, 3, mode=mode, padding_idx=padding)
    check(model, torch.randint(0, 5, (b, n)))


def test_the_oracle_is_not_the_tape() -> None:
    """A negative control: a gradient off by one part in a million is seen."""
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    expected = one_example_loop(model, (x,), weighed)["weight"]
    assert relative_error(expected * (1 + 1e-6), expected) > 1e-9
    assert math.isclose(relative_error(expected, expected), 0.0)
