"""What depends on how far a batch is padded is refused; what is masked, packed or of one width runs."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import dptorch
from dptorch.errors import ExamplesMixError, PrivacyWarning
from dptorch.sampling import PrivateLoader
from dptorch.validation import widths
from dptorch.validation.widths import WidthCheck

BOUND = 0.1
SHORT, LONG = 4, 60
Row = tuple[Tensor, Tensor]


class Reader(nn.Module):
    """Token ids [B, T], and whether each is one, to scores of three classes."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embedding(ids)
        kept = attention_mask[..., None].to(h.dtype)
        if self.pool == "last output":
            h = self.rnn(h)[0][:, -1]
        elif self.pool == "last output, masked":
            h = self.rnn(h)[0].gather(1, (kept.sum(1, keepdim=True) - 1).long().expand(-1, 1, 8))
            h = h[:, 0]
        elif self.pool == "packed":
            lengths = attention_mask.sum(1)
            packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
            h = self.rnn(packed)[1][0][-1]
        elif self.pool == "mean":
            h = h.mean(1)
        elif self.pool == "convolution":
            h = self.conv(h.mT).relu().mean(2)
        elif self.pool == "masked":
            h = (h * kept).sum(1) / kept.sum(1)
        else:
            assert self.pool == "sum"
            h = h.sum(1)
        scores: Tensor = self.head(self.drop(h))
        return scores


REFUSED = ["last output", "mean", "convolution"]
ALLOWED = ["last output, masked", "packed", "masked", "sum"]


def rows(longest: int, count: int = 30) -> list[Row]:
    g = torch.Generator().manual_seed(0)
    lengths = [SHORT - i % 2 for i in range(count - 1)] + [longest]
    labels = [1] * (count - 1) + [0]
    return [
        (torch.randint(1, 20, (n,), generator=g), torch.tensor(y))
        for n, y in zip(lengths, labels, strict=True)
    ]


def pads(items: list[Row], fixed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels: padded to the longest of the batch, or all to one length."""
    ids = pad_sequence([x for x, _ in items], batch_first=True)
    if fixed is not None:
        ids = F.pad(ids, (0, fixed - ids.shape[1]))
    return ids, (ids > 0).long(), torch.stack([y for _, y in items])


def one_step(pool: str, data: list[Row], *, self_check: bool = True, **loader: Any) -> Tensor:
    """The clipped sum of one step on all rows, flat."""
    torch.manual_seed(0)
    model = Reader(pool)
    model.drop.p = 0.0
    engine = dptorch.PrivacyEngine(
        model,
        sample_rate=1.0,
        batch_size=len(data),
        steps=1,
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        target_delta=1e-5,
        seed=0,
        self_check=self_check,
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for ids, mask, labels in engine.loader(data, **{"collate_fn": pads, **loader}):  # type: ignore[arg-type]
        F.cross_entropy(model(ids, mask), labels).backward()
        optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) * len(
        data
    )


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("pool", REFUSED)
def test_one_long_row_is_refused_before_the_first_step(pool: str) -> None:
    with pytest.raises(ExamplesMixError, match=r"how far its batch is padded \(60 columns or"):
        one_step(pool, rows(LONG))
    # Without the test, replacing that one record moves the sum by more than two bounds.
    twins = [one_step(pool, rows(n), self_check=False) for n in (LONG, SHORT)]
    assert float((twins[0] - twins[1]).norm()) > 2 * BOUND * 1.5


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_a_width_is_tested_whichever_row_is_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the data set's first, which is collated alone, and where a batch is sorted by length."""

    def longest_first(items: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
        return pads(sorted(items, key=lambda row: -len(row[0])))

    data = rows(LONG)[::-1]
    for settings in ({}, {"collate_fn": longest_first}):
        with pytest.raises(ExamplesMixError, match=r"how far its batch is padded \(60 columns or"):
            one_step("mean", data, **settings)
    # Broken twin: with that row alone, no width is seen to follow the examples.
    monkeypatch.setattr(PrivateLoader, "alone", property(lambda loader: loader._alone[:1]))
    twins = [one_step("mean", rows(n)[::-1]) for n in (LONG, SHORT)]
    assert float((twins[0] - twins[1]).norm()) > 2 * BOUND * 1.5


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("pool", ALLOWED)
def test_masked_and_packed_models_run_within_two_bounds(pool: str) -> None:
    sums = [one_step(pool, rows(n)) for n in (LONG, SHORT)]
    assert 0 < float((sums[0] - sums[1]).norm()) <= 2 * BOUND * (1 + 1e-4)


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("pool", REFUSED)
def test_rows_padded_to_one_length_run_within_two_bounds(pool: str) -> None:
    def fixed(items: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
        return pads(items, LONG)

    sums = [one_step(pool, rows(n), collate_fn=fixed) for n in (LONG, SHORT)]
    assert 0 < float((sums[0] - sums[1]).norm()) <= 2 * BOUND * (1 + 1e-4)


class Counted(nn.Module):
    """Means over time; counts its forward passes."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        self.seen += 1
        return self.layer(x + torch.rand(())).mean(1) * 0 + self.layer(x[:, 0])


def batch(width: int) -> Tensor:
    x = torch.ones(4, width, 2)
    x[:3, 2:] = 0
    return x


def test_a_fixed_width_is_not_tested() -> None:
    Counted.calls = 0
    check = WidthCheck(Counted(), 0)
    for _ in range(3):
        assert check((batch(6),), {}) is False
    assert Counted.calls == 0


def test_another_width_is_tested_once_and_its_first_padded_batch_ends_the_test() -> None:
    Counted.calls = 0
    check = WidthCheck(Counted(), 0)
    assert check((batch(6),), {}) is False
    assert check((torch.ones(4, 7, 2),), {}) is False  # nothing is padded
    assert Counted.calls == 0
    assert check((batch(8),), {}) is True
    assert Counted.calls == 2


def test_a_model_that_cannot_be_compared_is_warned_of_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Drawing(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:, 0]) + random.random()

    check = WidthCheck(Drawing(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [check((batch(width),), {}) for width in range(6, 10)] == [False] * 4
    with pytest.warns(PrivacyWarning, match="could not be tested"):
        assert check((batch(10),), {}) is True
    # Broken twin: it is tried for ever, and nobody is told that nothing was tested.
    monkeypatch.setattr(widths, "_TRIES", 100)
    check = WidthCheck(Drawing(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [check((batch(width),), {}) for width in range(6, 12)] == [False] * 6


class InFloat(nn.Module):
    """Gives in float32 what was computed in another precision, as accelerate does."""

    def __init__(self, dtype: torch.dtype, pooled: bool) -> None:
        super().__init__()
        self.layer, self.dtype, self.pooled = nn.Linear(2, 2), dtype, pooled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            h = self.layer(x)
        if self.pooled:
            return h.mean(1).float()
        return (h[:, 0] * (1 + 0.01 * (x.shape[1] < 8))).float()  # kernels that round otherwise


def test_rounding_in_half_precision_is_no_dependence_on_the_width() -> None:
    for dtype, pooled, refused in (
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, True),
        (torch.float32, False, True),  # the broken twin: there a hundredth is no rounding
    ):
        torch.manual_seed(1)
        check = WidthCheck(InFloat(dtype, pooled), 0)
        assert check((batch(6),), {}) is False
        if refused:
            with pytest.raises(ExamplesMixError, match="how far its batch is padded"):
                check((batch(8),), {})
        else:
            assert check((batch(8),), {}) is True


def test_the_test_leaves_no_trace() -> None:
    model = Counted()
    check = WidthCheck(model, 0)
    check((batch(6),), {})
    before = torch.get_rng_state()
    assert check((batch(8),), {}) is True
    assert torch.equal(before, torch.get_rng_state())
    assert float(model.seen) == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_full_rows_that_end_alike_are_not_taken_for_padded_ones() -> None:
    def shows_all(ids: Tensor, attention_mask: Tensor) -> Tensor:
        return ids[:, -1:].float()

    model = nn.Module()
    model.forward = shows_all  # type: ignore[method-assign]
    check = WidthCheck(model, 0)
    ids = torch.tensor([[3, 5, 4], [6, 7, 4], [8, 9, 4]])
    check((), {"ids": ids, "attention_mask": torch.ones_like(ids)})
    longer = torch.cat([ids, ids + 10], 1)
    longer[1, -1] = 0  # a token, by the mask
    assert check((), {"ids": longer, "attention_mask": torch.ones_like(longer)}) is False


@pytest.mark.parametrize("side", ["start", "end"])
def test_padding_is_found_at_both_ends_and_in_other_layouts(side: str) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    def inputs(width: int) -> Tensor:
        x = batch(width)
        return (x.flip(1) if side == "start" else x).transpose(0, 1)

    check = WidthCheck(Mean(), 1)
    assert check((inputs(6),), {}) is False
    with pytest.raises(ExamplesMixError, match=r"8 columns or 2"):
        check((inputs(8),), {})


def test_outputs_for_each_position_are_compared_where_rows_are_no_padding() -> None:
    class Positions(nn.Module):
        def __init__(self, mixed: bool) -> None:
            super().__init__()
            self.mixed = mixed

        def forward(self, x: Tensor) -> Tensor:
            seen = x[..., 0].abs().sum(1) if not self.mixed else x.shape[1]
            at_padding = torch.where((x == 0), float(x.shape[1]), x)
            return at_padding if not self.mixed else at_padding * seen

    for mixed in (False, True):
        check = WidthCheck(Positions(mixed), 0)
        assert check((batch(6),), {}) is False
        if mixed:
            with pytest.raises(ExamplesMixError, match="padded"):
                check((batch(8),), {})
        else:
            assert check((batch(8),), {}) is True
