"""nn.LSTM, nn.GRU and nn.RNN in all their options, against a loop over single examples."""

import itertools
from collections.abc import Callable

import pytest
import torch
from tests.oracles.loop import norms_of, one_example_loop, relative_error
from tests.tape.zoo.base import Lambda
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import dptorch
from dptorch.errors import ExamplesMixError, NotCoveredError
from dptorch.tape import Recording, Tape
from dptorch.tape.rules import recurrence

B, T, D, H = 4, 5, 3, 4
KINDS: dict[str, dict[str, object]] = {
    "LSTM": {},
    "projected LSTM": {"proj_size": 2},
    "GRU": {},
    "RNN": {},
    "relu RNN": {"nonlinearity": "relu"},
}
# Layers, directions, batch first, biases, packed, states given: each two of them in all four ways.
OPTIONS = [(a, b, c, a ^ b, a ^ c, b ^ c) for a, b, c in itertools.product((False, True), repeat=3)]


pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def layer(kind: str, **options: object) -> nn.RNNBase:
    made: nn.RNNBase = getattr(nn, kind.split()[-1])(D, H, **KINDS[kind], **options)
    return made


def outputs(out: Tensor, state: Tensor | tuple[Tensor, ...], first: bool) -> Tensor:
    """All that a recurrent layer gives, one row an example."""
    last = torch.cat(state, 2) if isinstance(state, tuple) else state
    out = out if first else out.transpose(0, 1)
    return torch.cat([out.flatten(1), last.transpose(0, 1).flatten(1)], 1)


def squares(model: nn.Module, *batch: Tensor) -> Tensor:
    out = model(*batch)
    return (out * torch.arange(1, out.shape[1] + 1) / 10).sin().sum(1)


def tape_of(model: nn.Module, *batch: Tensor) -> Tape:
    with dptorch.record(model) as tape:
        loss = squares(model, *batch).sum()
    loss.backward()
    return tape


def check(model: nn.Module, *batch: Tensor) -> None:
    expected = one_example_loop(model, batch, squares)
    tape = tape_of(model, *batch)
    torch.testing.assert_close(tape.norms(), norms_of(expected), rtol=1e-9, atol=1e-12)
    for key, gradient in tape.per_example_gradients().items():
        assert relative_error(gradient, expected[key]) <= 1e-9, key


def model_of(kind: str, options: tuple[bool, ...]) -> Lambda:
    deep, both, first, bias, packed, given = options
    own = layer(kind, num_layers=1 + deep, bidirectional=both, batch_first=first, bias=bias)

    def run(m: nn.Module, x: Tensor, lengths: Tensor, h: Tensor, c: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        h, c = h.transpose(0, 1), c.transpose(0, 1)
        states = ((h, c) if "LSTM" in kind else h) if given else None
        if packed:
            x = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        out, state = m.r(x, states)
        if packed:
            out, _ = pad_packed_sequence(out, batch_first=first, total_length=T)
        return outputs(out, state, first)

    return Lambda(run, r=own)


def batch_of(model: Lambda) -> tuple[Tensor, ...]:
    own = model.r
    count = own.num_layers * (1 + own.bidirectional)
    states = (torch.randn(B, count, size) for size in (own.proj_size or H, H))
    return torch.randn(B, T, D), torch.tensor([3, 5, 1, 5]), *states


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_equals_the_loop(kind: str) -> None:
    for options in OPTIONS:
        model = model_of(kind, options)
        batch = batch_of(model)
        check(model, *batch)
        with dptorch.record(model):
            recorded = model(*batch)
        torch.testing.assert_close(recorded, model(*batch), rtol=1e-12, atol=1e-14)


def test_no_option_needs_the_generic_rule() -> None:
    for kind, options in itertools.product(KINDS, OPTIONS):
        model = model_of(kind, options)
        recording = Recording(model)
        inputs = [recording.tag_batch(t) for t in batch_of(model)]
        with recording:
            model(*inputs)
        assert not recording.generic_ops


# -- what else a layer may be given ------------------------------------------------------------------


def test_dropout_is_the_same_forwards_and_backwards() -> None:
    """The masks are those that torch's own layer draws, and the gradients are of what they gave."""
    model = Lambda(
        lambda m, x: outputs(*m.r(x), first=True),
        r=layer("LSTM", num_layers=3, dropout=0.5, batch_first=True, bidirectional=True),
    )
    x = torch.randn(B, T, D)
    torch.manual_seed(1)
    expected = [model(x)]
    parameters = dict(model.named_parameters())
    for i in range(B):
        torch.manual_seed(1)
        loss = squares(model, x)[i]
        expected += [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters.values())])
        ]
    torch.manual_seed(1)
    with dptorch.record(model):
        out = model(x)
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-14)
    torch.manual_seed(1)
    found = tape_of(model, x).per_example_gradients()
    flat = torch.cat([found[name].flatten(1) for name in parameters], 1)
    assert relative_error(flat, torch.stack(expected[1:])) <= 1e-9


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_learned_states(kind: str) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h, c = (s.expand(-1, x.shape[0], -1) for s in m.s.chunk(2))
        return outputs(*m.r(x, (h, c) if kind == "LSTM" else h), first=True)

    own = layer(kind, batch_first=True)
    check(Lambda(run, r=own, s=torch.randn(2, 1, H)), torch.randn(B, T, D))


def test_weights_that_are_computed_frozen_or_used_twice() -> None:
    x = torch.randn(B, T, D)
    run = lambda m, x: outputs(*m.r(x), first=True)
    normed = layer("GRU", batch_first=True, num_layers=2)
    check(Lambda(run, r=parametrizations.weight_norm(normed, "weight_hh_l0")), x)
    frozen = layer("LSTM", batch_first=True, num_layers=2)
    for name, p in frozen.named_parameters():
        p.requires_grad_("l1" in name and "bias_ih" not in name)
    check(Lambda(run, r=frozen), x)
    again = Lambda(lambda m, x: run(m, m.r(x)[0]), r=nn.GRU(D, D, batch_first=True))
    check(again, x)
    shared = nn.RNN(H, H, 2, batch_first=True)
    shared.weight_ih_l1 = shared.weight_ih_l0
    check(Lambda(run, r=shared), torch.randn(B, T, H))


def test_positions_folded_into_the_batch() -> None:
    """Words of sentences, a layer over the letters of each."""
    run = lambda m, x: m.r(x.flatten(0, 1))[1][0].view(x.shape[0], -1)
    check(Lambda(run, r=layer("GRU", batch_first=True)), torch.randn(B, 2, T, D))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda t: m.r(t)[0], m.a(x), use_reentrant=reentrant).flatten(1)

    own = Lambda(run, r=layer("LSTM", batch_first=True), a=nn.Linear(D, D))
    x = torch.randn(B, T, D)
    plain = Lambda(lambda m, x: m.r(m.a(x))[0].flatten(1), r=own.r, a=own.a)
    expected = tape_of(plain, x).norms()
    torch.testing.assert_close(tape_of(own, x).norms(), expected, rtol=1e-12, atol=0)


def test_results_may_be_changed_in_place_and_weights_may_not() -> None:
    run = lambda m, x: m.r(x)[0].mul_(2.0).relu_().flatten(1)
    model = Lambda(run, r=layer("LSTM", batch_first=True, num_layers=2))
    x = torch.randn(B, T, D)
    check(model, x)
    with dptorch.record(model):
        loss = squares(model, x).sum()
    with torch.no_grad():
        model.r.weight_hh_l0.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_backwards_through_one_graph_agree() -> None:
    """What is kept is not used up: a first pass takes norms, a second adds up the sums."""
    model = Lambda(lambda m, x: m.r(x)[0].flatten(1), r=layer("GRU", batch_first=True))
    x = torch.randn(B, T, D)
    with dptorch.record(model) as tape:
        loss = squares(model, x).sum()
    with tape.set_aside():
        loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(tape.norms(), tape_of(model, x).norms(), rtol=0, atol=0)


# -- precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_float32_bfloat16_and_autocast(kind: str) -> None:
    """They are near float64, and give the types that torch's own layer does."""
    torch.set_default_dtype(torch.float32)
    model = Lambda(lambda m, x: outputs(*m.r(x), first=True), r=layer(kind, batch_first=True))
    x = torch.randn(B, T, D)
    found = tape_of(model, x).norms()
    with torch.autocast("cpu", torch.bfloat16):
        own = [t.dtype for t in torch.utils._pytree.tree_leaves(model.r(x))]
        with dptorch.record(model) as tape:
            loss = squares(model, x).float().sum()
            recorded = [t.dtype for t in torch.utils._pytree.tree_leaves(model.r(x))]
    loss.backward()
    assert own == recorded
    exact = tape_of(model.double(), x.double()).norms().float()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(tape.norms(), exact, rtol=3e-2, atol=0)
    half = tape_of(model.bfloat16(), x.bfloat16()).norms()
    torch.testing.assert_close(half, exact, rtol=3e-2, atol=0)


# -- refusals ----------------------------------------------------------------------------------------


def test_a_layer_that_runs_along_the_examples_is_refused() -> None:
    x = torch.randn(B, T, D)
    with pytest.raises(NotCoveredError, match="along the examples"):
        tape_of(Lambda(lambda m, x: m.r(x)[0].flatten(1), r=layer("LSTM")), x)

    def by_keyword(m: nn.Module, x: Tensor) -> Tensor:
        weights, h = m.r._flat_weights, x.new_zeros(1, T, H)
        out = torch.gru(x, h, weights, True, 1, 0.0, True, False, batch_first=False)[0]
        return out.flatten(1)

    with pytest.raises(NotCoveredError, match="along the examples"):
        tape_of(Lambda(by_keyword, r=layer("GRU")), x)


def test_a_state_of_the_last_batch_is_refused() -> None:
    model = layer("GRU", batch_first=True)
    with dptorch.record(model):
        _, state = model(torch.randn(B, T, D))
    with pytest.raises((NotCoveredError, ExamplesMixError)), dptorch.record(model):
        model(torch.randn(B, T, D), state)


# -- broken twins: the loop must see each --------------------------------------------------------------


def _after_in_place_of_before(layer: recurrence.Layer, first: Tensor, after: Tensor) -> Tensor:
    return after


def _one_gradient_for_both(real: Callable[..., recurrence.Found]) -> Callable[..., object]:
    def twin(*args: object) -> recurrence.Found:
        inner, first = real(*args)  # type: ignore[arg-type]
        return inner._replace(at_states=inner.at_inputs), first

    return twin


def test_broken_twins_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = lambda m, x: outputs(*m.r(x), first=True)
    x = torch.randn(B, T, D)
    gru = Lambda(run, r=layer("GRU", batch_first=True))
    lstm = Lambda(run, r=layer("LSTM", batch_first=True))
    check(gru, x)
    cell = recurrence.CELLS["gru"]
    with monkeypatch.context() as patch:
        twin = cell._replace(backward=_one_gradient_for_both(cell.backward))
        patch.setitem(recurrence.CELLS, "gru", twin)
        with pytest.raises(AssertionError):
            check(gru, x)
    for model in (gru, lstm):
        with monkeypatch.context() as patch:
            patch.setattr(recurrence.Layer, "before", _after_in_place_of_before)
            with pytest.raises(AssertionError):
                check(model, x)
