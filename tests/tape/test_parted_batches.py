"""Rows that the values of a batch send different ways and back: experts, clusters of classes, masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.oracles.loop import one_example_loop, relative_error
from tests.tape.zoo.base import Lambda
from torch import Tensor, nn

import dptorch
from dptorch.errors import PrivacyError
from dptorch.tape.propagation import FAMILIES
from dptorch.tape.provenance.tags import Tag

pytestmark = pytest.mark.usefixtures("float64")

D, OUT = 5, 4
Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]
Part = Callable[[Tensor, Tensor, Tensor, nn.Module], Tensor | None]

#: Where each of three examples goes: all to one, one alone (whose index may lose its dimension), two.
ROUTES = ([0, 0, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1])


def parted(part: Part) -> Forward:
    """A forward pass that fills ``out`` expert by expert, in place or as `part` returns it."""

    def forward(m: nn.Module, x: Tensor, route: Tensor) -> Tensor:
        out = torch.zeros(len(x), OUT)
        for number, expert in enumerate(m.experts):  # type: ignore[arg-type]
            made = part(out, x, route == number, expert)
            out = out if made is None else made
        return out

    return forward


def copied(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    rows = mine.nonzero().squeeze()
    out.index_copy_(0, rows, expert(x.index_select(0, rows)))


def assigned(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    rows = torch.where(mine)[0]
    out[rows] = expert(x[rows])


def assigned_in_columns(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    rows = torch.where(mine)[0]
    out[rows, :2] = expert(x[rows])[:, 2:]


def increased(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    rows = torch.argwhere(mine)[:, 0]
    out[rows] += expert(x[rows])


def masked(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    out[mine] = expert(x[mine])


def increased_by_mask(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    out[mine] += expert(x[mine])


def selected(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    values = expert(x.masked_select(mine[:, None]).view(-1, D))
    return out.masked_scatter(mine[:, None], values)


def scattered(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    rows = mine.nonzero().flatten()
    return out.scatter(0, rows[:, None].expand(-1, OUT), expert(x[rows]))


def gathered(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    (rows,) = mine.nonzero(as_tuple=True)
    picked = x.gather(0, rows[:, None].expand(-1, D))
    return out.scatter_add(0, rows[:, None].expand(-1, OUT), expert(picked))


def put(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    (rows,) = torch.where(mine)
    return out.index_put((rows,), expert(torch.index_select(x, 0, rows)), accumulate=True)


def with_indicators(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    rows = mine.nonzero().squeeze(1)
    chosen = torch.zeros(len(x), 1)
    chosen[rows] = 1.0
    return out + chosen * expert(x)


def flattened(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    rows = mine.nonzero().squeeze(1)
    values = expert(x[rows].reshape(-1)[None].view(-1, D)).flatten().view(-1, 2, 2)
    return out.index_add(0, rows, values.transpose(1, 2).reshape(-1, OUT))


def tokens(m: nn.Module, x: Tensor, route: Tensor) -> Tensor:
    """Each of two tokens of an example goes its own way."""
    flat = torch.stack([x, x.flip(1).sin()], 1).view(-1, D)
    ways = torch.stack([route, 1 - route * 0], 1).view(-1)
    out = torch.zeros(len(flat), OUT)
    for number, expert in enumerate(m.experts):  # type: ignore[arg-type]
        rows = (ways == number).nonzero().squeeze()
        out.index_copy_(0, rows, expert(flat[rows].view(-1, D)))
    return out.view(len(x), 2 * OUT)


def put_together(m: nn.Module, x: Tensor, route: Tensor) -> Tensor:
    rows = [torch.where(route == number)[0] for number in range(2)]
    values = [expert(x[r]) for expert, r in zip(m.experts, rows, strict=True)]  # type: ignore[arg-type]
    out = torch.zeros(len(x), OUT)
    out[torch.cat(rows)] = torch.cat(values)
    return out


FORWARDS: dict[str, Forward] = {
    part.__name__: parted(part)
    for part in (
        copied, assigned, assigned_in_columns, increased, masked, increased_by_mask, selected,
        scattered, gathered, put, with_indicators, flattened,
    )
} | {"tokens": tokens, "put_together": put_together}  # fmt: skip


def model_of(forward: Forward) -> nn.Module:
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Sequential(nn.Linear(D, OUT), nn.Tanh()) for _ in range(2))
    return Lambda(lambda m, x, route: forward(m, m.a(x), route), a=nn.Linear(D, D), experts=experts)


def total(m: nn.Module, x: Tensor, route: Tensor) -> Tensor:
    return (m(x, route) * (2 + x[:, :1])).square().sum(1)


def run(forward: Forward, route: list[int]) -> None:
    model = model_of(forward)
    inputs = [torch.randn(len(route), D), torch.tensor(route)]
    expected = one_example_loop(model, inputs, total)
    with dptorch.record(model) as tape:
        total(model, *inputs).sum().backward()
    assert expected["a.weight"].flatten(1).norm(dim=1).min() > 0
    for name, gradient in tape.per_example_gradients().items():
        assert relative_error(gradient, expected[name]) <= 1e-9, name


@pytest.mark.parametrize("name", FORWARDS)
def test_rows_that_are_parted_by_their_values(name: str) -> None:
    for route in ROUTES:
        run(FORWARDS[name], route)


@pytest.mark.parametrize("mode", ["auto", "BK-ghost", "non-ghost"])
def test_an_expert_gets_no_row_of_the_only_example(mode: str) -> None:
    """The last part of a batch is often a single example."""
    model, inputs = model_of(FORWARDS["masked"]), [torch.randn(1, D), torch.tensor([1])]
    expected = one_example_loop(model, inputs, total)
    with dptorch.record(model, mode=mode) as tape:
        total(model, *inputs).sum().backward()
    length = torch.stack([g.norm() for g in expected.values()]).norm()
    assert relative_error(tape.norms(), length[None]) <= 1e-9
    for name, kept in tape.clipped_sum(torch.tensor([0.5])).items():
        assert relative_error(kept, expected[name][0] / 2) <= 1e-9, name
    assert not expected["experts.0.0.weight"].any()


def test_losses_of_parts_add_up() -> None:
    model = model_of(lambda m, x, route: m.experts[0](x))  # type: ignore[index]

    def loss(m: nn.Module, x: Tensor, route: Tensor) -> Tensor:
        h = m(x, route)
        parts = [h[(route == k).nonzero().squeeze(1)] for k in range(2)]
        return parts[0].square().sum() + 2 * parts[1].exp().sum()

    for route in ROUTES:
        inputs = [torch.randn(3, D), torch.tensor(route)]
        expected = one_example_loop(model, inputs, loss)
        with dptorch.record(model) as tape:
            loss(model, *inputs).backward()
        for name, gradient in tape.per_example_gradients().items():
            assert relative_error(gradient, expected[name]) <= 1e-9, name


def centred(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    values = expert(x[mine])
    out[mine] = values - values.mean(0)


def turned(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    rows = mine.nonzero().squeeze(1)
    out.index_copy_(0, rows.flip(0), expert(x[rows]))


def mirrored(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    rows = mine.nonzero().squeeze(1)
    out.index_copy_(0, len(out) - 1 - rows, expert(x[rows]))


def turned_by_assignment(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    rows = mine.nonzero().squeeze(1)
    out[rows] = expert(x[rows]).flip(0)


def of_the_first(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    rows = mine.nonzero().squeeze(1)
    out[rows] = expert(x[rows]) * x[rows][:1, :OUT]


def at_the_front(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    values = expert(x[mine])
    return torch.cat([values, out])[: len(out)] + expert(x)


def by_place(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    """What a row gets depends on how many before it went the same way."""
    places = torch.arange(3.0)[:, None] + 1
    rows = mine.nonzero().squeeze(1)
    return out.index_copy(0, rows, (places * torch.ones(OUT))[: rows.shape[0]]) * expert(x)


def by_their_number(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> None:
    rows = mine.nonzero().squeeze(1)
    out[rows] = expert(x[rows]) / rows.numel()


def by_the_rank_of_an_index(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    """``squeeze`` drops the dimension where one row is picked: its rank tells of the others."""
    rows = mine.nonzero().squeeze()
    return out + expert(x) * (1.0 if rows.dim() else 2.0)


def by_the_rank_of_values(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
    picked = x[mine.nonzero().squeeze()]
    return out + expert(x) * (1.0 if len(picked.shape) > 1 else 2.0)


MIXING = (
    centred, turned, mirrored, turned_by_assignment, of_the_first, at_the_front, by_place,
    by_their_number,
    by_the_rank_of_an_index, by_the_rank_of_values,
)  # fmt: skip


@pytest.mark.parametrize("part", MIXING, ids=lambda part: part.__name__)
def test_parts_whose_rows_meet_are_refused(part: Part) -> None:
    for route in ([0, 1, 1], [0, 1, 0]):
        with pytest.raises(PrivacyError):
            run(parted(part), route)


@pytest.mark.parametrize(
    ("op", "part"),
    [("index_copy", mirrored), ("masked_scatter", selected)],
    ids=["mirrored", "selected"],
)
def test_rows_taken_for_their_own_would_be_caught(
    op: str, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that takes whatever is written for rows in their order is contradicted by the loop."""
    monkeypatch.setitem(FAMILIES, op, lambda call, outputs: Tag(0))
    if part is selected:
        monkeypatch.setitem(FAMILIES, "flip", lambda call, outputs: call.tagged[0][1])

        def turned_selection(out: Tensor, x: Tensor, mine: Tensor, expert: nn.Module) -> Tensor:
            values = expert(x.masked_select(mine[:, None]).view(-1, D)).flip(0)
            return out.masked_scatter(mine[:, None], values)

        part = turned_selection
    with pytest.raises(AssertionError):
        run(parted(part), [0, 1, 1])
