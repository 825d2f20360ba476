"""Examples of different sizes one after another: packed sequences, bags, flat targets, graphs.

Each model is held against a loop that runs it on one example, with its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.loop import relative_error
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import Dataset

import dptorch
from dptorch import PrivacyEngine
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.tape import Ragged
from dptorch.tape.recording import batch_dims as module

LENGTHS = (3, 1, 4, 2)
B = len(LENGTHS)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def check(model: nn.Module, batch: tuple[Any, ...], one: Callable[[int], tuple[Any, ...]],
          dims: Any = 0, loss: Callable[..., Tensor] | None = None) -> None:  # fmt: skip
    """The tape on the batch equals the loop over single examples."""

    def squares(m: nn.Module, *b: Any) -> Tensor:
        return m(*b).square().flatten(1).sum(1)

    loss = loss or squares
    parameters = dict(model.named_parameters())
    each = [
        torch.autograd.grad(
            loss(model, *one(i)).sum(), list(parameters.values()), allow_unused=True
        )
        for i in range(B)
    ]
    with dptorch.record(model, batch_dims=dims) as tape:
        loss(model, *batch).sum().backward()
    found = tape.per_example_gradients()
    for k, (name, p) in enumerate(parameters.items()):
        expected = torch.stack([torch.zeros_like(p) if g[k] is None else g[k] for g in each])
        assert relative_error(found[name], expected) <= 1e-9, name


class Recurrent(nn.Module):
    def __init__(self, kind: str, use: str) -> None:
        super().__init__()
        self.r = getattr(nn, kind)(3, 4, batch_first=True, bidirectional=use == "both")
        self.o, self.use = nn.Linear(8 if use == "both" else 4, 2), use

    def forward(self, x: PackedSequence) -> Tensor:
        out, state = self.r(x)
        if self.use == "outputs":
            padded, _ = pad_packed_sequence(out, batch_first=True)
            return self.o(padded).sum(1) - self.o.bias * (padded.shape[1] - 1)
        h = state[0] if isinstance(state, tuple) else state
        return self.o(h.transpose(0, 1).flatten(1) if self.use == "both" else h[-1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("use", ["last", "both"])
@pytest.mark.parametrize("sort", [True, False])
def test_packed_sequences_as_input(kind: str, use: str, sort: bool) -> None:
    lengths = sorted(LENGTHS, reverse=True) if sort else LENGTHS
    rows = [torch.randn(k, 3) for k in lengths]
    batch = pack_sequence(rows, enforce_sorted=sort)
    check(Recurrent(kind, use), (batch,), lambda i: (pack_sequence([rows[i]]),))


class Bags(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.e, self.o = nn.EmbeddingBag(9, 3, **settings), nn.Linear(3, 2)

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.o(self.e(ids, offsets, weights))


BAGS = [[1, 2, 2], [5], [], [7, 0, 5, 3]]
BAG_DIMS = {"ids": Ragged("offsets", "offsets"), "weights": Ragged("offsets", "offsets")}
START = torch.tensor([0])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 5])
def test_bags_with_offsets(mode: str, padding: int | None) -> None:
    ids = torch.tensor([i for bag in BAGS for i in bag])
    offsets = torch.tensor([0, 3, 4, 4])
    one = lambda i: (torch.tensor(BAGS[i], dtype=torch.long), START)
    check(Bags(mode=mode, padding_idx=padding), (ids, offsets), one, BAG_DIMS)


def test_bags_with_weights() -> None:
    ids, offsets = torch.tensor([i for bag in BAGS for i in bag]), torch.tensor([0, 3, 4, 4])
    weights = torch.rand(len(ids))
    parts = torch.tensor_split(weights, offsets[1:])
    one = lambda i: (torch.tensor(BAGS[i], dtype=torch.long), START, parts[i])
    check(Bags(mode="sum"), (ids, offsets, weights), one, BAG_DIMS)


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 5)

    def forward(self, x: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        scores = self.l(x).log_softmax(-1).transpose(0, 1)
        full = torch.full((len(x),), x.shape[1])
        return F.ctc_loss(scores, targets, full, lengths, reduction="none")


def test_flat_targets_of_ctc() -> None:
    x, lengths = torch.randn(B, 9, 3), torch.tensor(LENGTHS)
    targets = torch.randint(1, 5, (sum(LENGTHS),))
    parts = targets.split(LENGTHS)
    check(
        Speech(), (x, targets, lengths), lambda i: (x[i : i + 1], parts[i], lengths[i : i + 1]),
        {"targets": Ragged("lengths", "lengths")}, lambda m, *b: m(*b),
    )  # fmt: skip


def test_flat_targets_selected_from_rows_and_a_mean() -> None:
    """As Wav2Vec2 takes its labels: rows padded with -100, put one after another by their mask."""

    class Selected(Speech):
        def forward(self, x: Tensor, rows: Tensor, full: Tensor) -> Tensor:
            mask = rows >= 0
            scores = self.l(x).log_softmax(-1).transpose(0, 1)
            return F.ctc_loss(scores, rows.masked_select(mask), full, mask.sum(1), reduction="mean")

    x, model = torch.randn(B, 9, 3), Selected()
    rows = torch.randint(1, 5, (B, 4)).masked_fill(
        torch.arange(4) >= torch.tensor(LENGTHS)[:, None], -100
    )
    full = torch.full((B,), 9)
    each = [
        torch.autograd.grad(model(x[i : i + 1], rows[i : i + 1], full[:1]), model.l.weight)[0]
        for i in range(B)
    ]
    with dptorch.record(model) as tape:
        model(x, rows, full).backward()
    found = B * tape.per_example_gradients()["l.weight"]
    assert relative_error(found, torch.stack(each)) <= 1e-9


class Graph(nn.Module):
    """Messages along edges, mean over the nodes of each graph: block-diagonal batches of graphs."""

    def __init__(self, pool: str = "index_add") -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.pool = pool

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, graphs: int) -> Tensor:
        source, target = edge_index
        heard = torch.zeros(len(x), 4).index_add(0, target, self.a(x)[source])
        h = torch.relu(self.b(x) + heard)
        if self.pool == "scatter":
            ids = batch[:, None].expand_as(h)
            total = torch.zeros(graphs, 4).scatter_add(0, ids, h)
        else:
            total = torch.zeros(graphs, 4).index_add(0, batch, h)
        nodes = torch.zeros(graphs).index_add(0, batch, torch.ones(len(batch)))
        return self.o(total / nodes[:, None])


def graph(nodes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(nodes, 3), torch.randint(0, nodes, (2, 2 * nodes))


GRAPH_DIMS = {
    "x": Ragged("batch", examples="graphs"),
    "batch": Ragged("batch", examples="graphs"),
    "edge_index": Ragged(lambda a: a["batch"][a["edge_index"][0]], dim=1, examples="graphs"),
}


def collated(graphs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, int]:
    first, edges, owners = 0, [], []
    for i, (x, e) in enumerate(graphs):
        edges.append(e + first)
        owners += [i] * len(x)
        first += len(x)
    return torch.cat([x for x, _ in graphs]), torch.cat(edges, 1), torch.tensor(owners), len(graphs)


@pytest.mark.parametrize("pool", ["index_add", "scatter"])
def test_block_diagonal_graphs(pool: str) -> None:
    graphs = [graph(k) for k in LENGTHS]
    check(Graph(pool), collated(graphs), lambda i: collated([graphs[i]]), GRAPH_DIMS)


def test_an_edge_between_two_graphs_is_refused() -> None:
    x, edges, batch, count = collated([graph(k) for k in LENGTHS])
    edges[1, 0] = (edges[0, 0] + LENGTHS[0]) % len(x)
    model = Graph()
    with dptorch.record(model, batch_dims=GRAPH_DIMS), pytest.raises(PrivacyError):
        model(x, edges, batch, count)


class BagData(Dataset[tuple[list[int], float]]):
    def __len__(self) -> int:
        return len(BAGS)

    def __getitem__(self, i: int) -> tuple[list[int], float]:
        return BAGS[i], float(i)


def collate(rows: list[tuple[list[int], float]]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = [0, *(len(ids) for ids, _ in rows)]
    ids = torch.tensor([i for ids, _ in rows for i in ids], dtype=torch.long)
    return ids, torch.tensor(lengths[:-1]).cumsum(0), torch.tensor([y for _, y in rows])


def test_a_step_of_the_engine_on_bags() -> None:
    """The loader's collate function packs the bags; the engine is told whose the ids are."""
    model = Bags(mode="mean")
    loss = lambda m, ids, offsets, y: (m(ids, offsets).sum(1) - y).square()
    parameters = list(model.parameters())
    each = [
        torch.autograd.grad(loss(model, *collate([BagData()[i]])).sum(), parameters)
        for i in range(B)
    ]
    engine = PrivacyEngine(
        model, sample_rate=1.0, sample_size=B, steps=1, noise_multiplier=0.0, target_delta=1e-3,
        max_grad_norm=0.5, seed=0, batch_dims=BAG_DIMS,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(parameters, lr=0.0))
    for ids, offsets, y in engine.loader(BagData(), collate_fn=collate):
        loss(model, ids, offsets, y).mean().backward()
        optimizer.step()
    norms = [torch.stack([g.square().sum() for g in gs]).sum().sqrt() for gs in each]
    for k, p in enumerate(parameters):
        expected = (
            sum((0.5 / n).clamp(max=1) * gs[k] for n, gs in zip(norms, each, strict=True)) / B
        )
        assert p.grad is not None
        assert relative_error(p.grad, torch.as_tensor(expected)) <= 1e-9


def test_inputs_of_unequal_sizes_say_what_to_do() -> None:
    """The advice of the error is followed as it stands, and the model then runs."""
    model = Bags(mode="sum")
    ids, offsets = torch.tensor([i for bag in BAGS for i in bag]), torch.tensor([0, 3, 4, 4])
    with pytest.raises(ConfigurationError) as raised, dptorch.record(model):
        model(ids, offsets)
    advice = str(raised.value).split("batch_dims=")[-1].split(" where")[0]
    dims = eval(advice, {"dptorch": dptorch})
    with dptorch.record(model, batch_dims=dims) as tape:
        model(ids, offsets).sum().backward()
    assert tape.batch_size == B


@pytest.mark.parametrize(
    ("dims", "match"),
    [
        ({"ids": Ragged("starts", "offsets")}, "'starts' tells whose .* Pass it to the model"),
        ({"ids": Ragged("offsets", "lengths")}, "has 8 rows .* speak of 11 rows of 4 examples"),
        ({"ids": Ragged(lambda a: a["ids"] * 1.0)}, "expected whole numbers"),
        ({"ids": Ragged(lambda a: a["ids"][:3])}, "speak of 3 rows"),
        ({"ids": Ragged(lambda a: a["ids"] - 4)}, "from 0 to"),
    ],
)
def test_what_does_not_fit_is_refused(dims: Any, match: str) -> None:
    model = Bags(mode="sum")
    ids, offsets = torch.tensor([i for bag in BAGS for i in bag]), torch.tensor([0, 3, 4, 4])
    with pytest.raises(ConfigurationError, match=match), dptorch.record(model, batch_dims=dims):
        model(ids, offsets)
    with pytest.raises(ConfigurationError, match="'owners', 'lengths' or 'offsets'"):
        Ragged("offsets", "counts")


def test_rows_given_to_the_wrong_example_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners that are off by one row: the loop disagrees, or the bags do."""
    right = module.Ragged.owners

    def wrong(self: Ragged, name: str, t: Tensor, arguments: Any) -> tuple[Tensor, int]:
        owner, count = right(self, name, t, arguments)
        return owner.roll(1), count

    monkeypatch.setattr(module.Ragged, "owners", wrong)
    with pytest.raises((AssertionError, PrivacyError)):
        test_bags_with_offsets("sum", None)
    with pytest.raises((AssertionError, PrivacyError)):
        test_block_diagonal_graphs("index_add")


def test_packed_rows_in_another_order_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.packed_owners

    def wrong(packed: PackedSequence) -> tuple[Tensor, int]:
        owner, count = right(packed)
        return (owner + 1) % count, count

    monkeypatch.setattr(module, "packed_owners", wrong)
    with pytest.raises((AssertionError, PrivacyError)):
        test_packed_sequences_as_input("LSTM", "last", False)


def test_a_check_of_a_ragged_batch_says_why_it_cannot() -> None:
    rows = [torch.randn(k, 3) for k in LENGTHS]
    batch = (pack_sequence(rows, enforce_sorted=False),)
    with pytest.raises(ConfigurationError, match="cannot be cut"):
        dptorch.check(
            Recurrent("LSTM", "last"), batch, lambda m, b: m(*b).sum(), batch_dims={"x": 0}
        )
