"""Every layer of ``torch.nn`` that has parameters, in its own settings, under both loss reductions.

The rules are tested by themselves in ``test_rules_property.py``; here whole layers are, by name, so
that a layer which a future torch adds fails this file until it has a row.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tape.properties import check, convolution, weighed
from tests.tape.zoo.base import Lambda
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dptorch
from dptorch.errors import NotCoveredError
from dptorch.tape import Tape

Draw = Callable[[st.SearchStrategy], object]
Drawn = tuple[nn.Module, tuple[Tensor, ...]]

LAYERS: dict[str, Callable[[str, st.DataObject], Drawn]] = {}
# Parameters of their own, but nothing here to test.
ELSEWHERE = {
    "ModuleList": "holds layers",
    "ParameterDict": "holds parameters; the zoo uses raw ones",
    "ParameterList": "holds parameters; the zoo uses raw ones",
    "Sequential": "holds layers",
    "Unflatten": "has no parameters",
    "AdaptiveLogSoftmaxWithLoss": "has a test of its own below",
    "RNNBase": "abstract",
    "RNNCellBase": "abstract",
    "SyncBatchNorm": "needs several processes; refused as every BatchNorm in training is",
}
flag = st.booleans()
few = st.integers(1, 3)


pytestmark = pytest.mark.usefixtures("float64")


def layer(
    *names: str,
) -> Callable[[Callable[[str, st.DataObject], Drawn]], Callable[[str, st.DataObject], Drawn]]:
    """Enter the function as the one that draws the layers of these names, with a batch each."""

    def enter(draw: Callable[[str, st.DataObject], Drawn]) -> Callable[..., Drawn]:
        LAYERS.update({name: draw for name in names if hasattr(nn, name)})
        return draw

    return enter


def randomised(module: nn.Module) -> nn.Module:
    """Parameters that are ones or zeros at first would hide mistakes."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.7)
    return module


# -- affine maps and tables ------------------------------------------------------------------------


@layer("Linear")
def linear(name: str, data: st.DataObject) -> Drawn:
    lead = data.draw(st.lists(few, min_size=1, max_size=4))  # 2 to 5 dimensions
    d, p = data.draw(few), data.draw(few)
    return nn.Linear(d, p, bias=data.draw(flag)), (torch.randn(*lead, d),)


@layer("Bilinear")
def bilinear(name: str, data: st.DataObject) -> Drawn:
    lead = data.draw(st.lists(few, min_size=1, max_size=3))
    d, e, p = data.draw(few), data.draw(few), data.draw(few)
    batch = torch.randn(*lead, d), torch.randn(*lead, e)
    return nn.Bilinear(d, e, p, bias=data.draw(flag)), batch


@layer(*(f"Conv{kind}{rank}d" for kind in ("", "Transpose") for rank in (1, 2, 3)))
def convolutions(name: str, data: st.DataObject) -> Drawn:
    module, shape = convolution(int(name[-2]), "Transpose" in name, data.draw(flag), data)
    return module, (torch.randn(data.draw(few), *shape),)


@layer("Embedding")
def embedding(name: str, data: st.DataObject) -> Drawn:
    padding = data.draw(st.sampled_from([None, 0, -1]))
    lead = data.draw(st.lists(few, min_size=1, max_size=3))
    return nn.Embedding(4, 3, padding_idx=padding), (torch.randint(0, 4, lead),)


@layer("EmbeddingBag")
def embedding_bag(name: str, data: st.DataObject) -> Drawn:
    """Five ids out of four, so that every bag holds one twice."""
    mode = data.draw(st.sampled_from(["sum", "mean", "max"]))
    module = nn.EmbeddingBag(4, 3, mode=mode, padding_idx=data.draw(st.sampled_from([None, 1])))
    ids = torch.randint(0, 4, (data.draw(few), 5))
    if mode == "sum" and data.draw(flag):
        run = lambda m, i, w: m.e(i, per_sample_weights=w)
        return Lambda(run, e=module), (ids, torch.randn(ids.shape))
    if mode != "max" and data.draw(flag):  # all bags in one long tensor
        run = lambda m, i: m.e(i.flatten(), torch.arange(0, i.numel(), i.shape[1]))
        return Lambda(run, e=module), (ids,)
    return module, (ids,)


@layer("LinearCrossEntropyLoss")
def linear_cross_entropy(name: str, data: st.DataObject) -> Drawn:
    """A head and its loss in one, in newer releases of torch."""
    b, d, p = data.draw(few), data.draw(few), data.draw(st.integers(2, 4))
    module = nn.LinearCrossEntropyLoss(
        d, p, bias=data.draw(flag), reduction="none",
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1])),
    )  # fmt: skip
    return module, (torch.randn(b, d), torch.randint(0, p, (b,)))


# -- normalisation and activations -----------------------------------------------------------------


@layer("LayerNorm", "RMSNorm")
def over_features(name: str, data: st.DataObject) -> Drawn:
    shape = data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    own = shape[data.draw(st.integers(0, len(shape) - 1)) :]
    bias = {"bias": data.draw(flag)} if name == "LayerNorm" else {}
    return randomised(getattr(nn, name)(own, **bias)), (torch.randn(data.draw(few), *shape),)


@layer("GroupNorm")
def group_norm(name: str, data: st.DataObject) -> Drawn:
    groups, each = data.draw(few), data.draw(few)
    shape = data.draw(st.lists(st.integers(2, 3), min_size=1, max_size=3))
    module = randomised(nn.GroupNorm(groups, groups * each))
    return module, (torch.randn(data.draw(few), groups * each, *shape),)


@layer(*(f"{kind}Norm{rank}d" for kind in ("Batch", "Instance") for rank in (1, 2, 3)))
def over_space(name: str, data: st.DataObject) -> Drawn:
    """BatchNorm in eval mode with running statistics; InstanceNorm with and without them."""
    channels, batch = data.draw(few), name.startswith("Batch")
    tracked = batch or data.draw(flag)
    module = getattr(nn, name)(channels, affine=True, track_running_stats=tracked)
    if tracked:
        module.eval()
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    shape = data.draw(st.lists(st.integers(2, 3), min_size=int(name[-2]), max_size=int(name[-2])))
    if name == "BatchNorm1d" and data.draw(flag):
        shape = []
    return randomised(module), (torch.randn(data.draw(few), channels, *shape),)


@layer("PReLU")
def prelu(name: str, data: st.DataObject) -> Drawn:
    channels = data.draw(few)
    shape = data.draw(st.lists(few, max_size=2))
    module = randomised(nn.PReLU(data.draw(st.sampled_from([1, channels]))))
    return module, (torch.randn(data.draw(few), channels, *shape),)


# -- recurrence ------------------------------------------------------------------------------------


@layer("RNN", "GRU", "LSTM")
def recurrent(name: str, data: st.DataObject) -> Drawn:
    first, both, packed, b = data.draw(flag), data.draw(flag), data.draw(flag), data.draw(few)
    extra = {
        "RNN": {"nonlinearity": data.draw(st.sampled_from(["tanh", "relu"]))},
        "LSTM": {"proj_size": data.draw(st.sampled_from([0, 2]))},
    }
    module = getattr(nn, name)(
        3, 4, data.draw(st.integers(1, 2)), batch_first=first, bidirectional=both,
        bias=data.draw(flag), **extra.get(name, {}),
    )  # fmt: skip

    def run(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        if packed:
            x = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        out, state = m.r(x)
        if packed:
            out, _ = pad_packed_sequence(out, batch_first=first, total_length=4)
        last = (state[-1] if name == "LSTM" else state).transpose(0, 1)
        return torch.cat([(out if first else out.transpose(0, 1)).flatten(1), last.flatten(1)], 1)

    return Lambda(run, r=module), (torch.randn(b, 4, 3), torch.randint(1, 5, (b,)))


@layer("RNNCell", "GRUCell", "LSTMCell")
def cell(name: str, data: st.DataObject) -> Drawn:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = m.c(step, state)
        return torch.cat(state, 1) if name == "LSTMCell" else state

    module = getattr(nn, name)(3, 2, bias=data.draw(flag))
    return Lambda(run, c=module), (torch.randn(data.draw(few), data.draw(few), 3),)


# -- attention -------------------------------------------------------------------------------------


def padded(b: int, length: int) -> Tensor:
    """Where sequences of random length, at least one, are padding."""
    return torch.arange(length) >= torch.randint(1, length + 1, (b, 1))


def causal(length: int, as_numbers: bool) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.zeros(length, length).masked_fill(mask, -torch.inf) if as_numbers else mask


@layer("MultiheadAttention")
def attention(name: str, data: st.DataObject) -> Drawn:
    first, own, hidden, b = (data.draw(s) for s in (flag, flag, flag, few))
    t, s, width = data.draw(few), data.draw(few), data.draw(st.sampled_from([4, 5]))
    module = nn.MultiheadAttention(
        4, data.draw(st.sampled_from([1, 2])), batch_first=first, bias=data.draw(flag),
        add_bias_kv=data.draw(flag), add_zero_attn=data.draw(flag),
        kdim=None if own else width, vdim=None if own else width,
    )  # fmt: skip
    weights, masked = data.draw(flag), data.draw(flag)

    def run(m: nn.Module, x: Tensor, y: Tensor, pad: Tensor) -> Tensor:
        x, y = (x, x if own else y) if first else (z.transpose(0, 1) for z in (x, x if own else y))
        out, seen = m.a(
            x, y, y, key_padding_mask=pad if hidden else None, need_weights=weights,
            attn_mask=causal(t, False) if own and masked else None,
        )  # fmt: skip
        out = (out if first else out.transpose(0, 1)).flatten(1)
        return torch.cat([out, seen.flatten(1)], 1) if weights else out

    batch = torch.randn(b, t, 4), torch.randn(b, s, width), padded(b, t if own else s)
    return Lambda(run, a=randomised(module)), batch


@layer(
    "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder",
    "TransformerDecoder", "Transformer",
)  # fmt: skip
def transformer(name: str, data: st.DataObject) -> Drawn:
    first, masked, numbers, b = (data.draw(s) for s in (flag, flag, flag, few))
    t, s = data.draw(few), data.draw(few)
    settings = {
        "batch_first": first, "norm_first": data.draw(flag), "bias": data.draw(flag),
        "activation": data.draw(st.sampled_from(["relu", "gelu"])), "dropout": 0.0,
    }  # fmt: skip
    if name == "Transformer":
        module = nn.Transformer(4, 2, 1, 1, 5, **settings)
    elif name.endswith("Layer"):
        module = getattr(nn, name)(4, 2, 5, **settings)
    else:
        module = getattr(nn, name)(getattr(nn, f"{name}Layer")(4, 2, 5, **settings), 2)
    side = {"Transformer": "tgt", "Encoder": "src", "Decoder": "tgt"}[
        name.removeprefix("Transformer").removesuffix("Layer") or "Transformer"
    ]
    of_layer = name == "TransformerEncoderLayer"
    of_stack = name == "TransformerEncoder"

    def run(m: nn.Module, x: Tensor, memory: Tensor, pad: Tensor) -> Tensor:
        x, memory = (x, memory) if first else (x.transpose(0, 1), memory.transpose(0, 1))
        mask = causal(t, numbers) if masked else None
        named = {"mask" if of_stack else f"{side}_mask": mask, f"{side}_key_padding_mask": pad}
        inputs = {"Transformer": (memory, x)}.get(name, (x, memory))
        out = m.t(*(inputs[:1] if of_layer or of_stack else inputs), **named)
        return out if first else out.transpose(0, 1)

    batch = torch.randn(b, t, 4), torch.randn(b, s, 4), padded(b, t)
    return Lambda(run, t=module.train()), batch


# -- the test, and its controls --------------------------------------------------------------------

some = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@some
@given(st.data())
def test_the_layer_equals_the_loop(name: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    module, batch = LAYERS[name](name, data)
    check(module, *batch)


WRAPPED = {
    "Linear": lambda: (nn.Linear(3, 4), (3,)),
    "Conv2d": lambda: (nn.Conv2d(2, 4, 2, groups=2), (2, 3, 3)),
    "ConvTranspose1d": lambda: (nn.ConvTranspose1d(2, 3, 2), (2, 4)),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "spectral_norm"])
@pytest.mark.parametrize("training", [False, True])
def test_a_parametrized_layer_equals_the_loop(name: str, kind: str, training: bool) -> None:
    """In training, each forward of spectral_norm moves two vectors by the weight alone: no example
    enters them, so the gradient is exact once the loop starts each forward from the same two."""
    torch.manual_seed(0)
    inner, shape = WRAPPED[name]()
    module = getattr(parametrizations, kind)(inner).train(training)
    start = {n: b.clone() for n, b in module.named_buffers()}

    def loss(m: nn.Module, *batch: Tensor) -> Tensor:
        for n, b in m.named_buffers():
            b.data.copy_(start[n])
        return weighed(m, *batch)

    check(module, torch.randn(3, *shape), loss=loss)
    moved = any(not torch.equal(b, start[n]) for n, b in module.named_buffers())
    assert moved == (training and kind == "spectral_norm")


def bags(mode: str, step: int) -> nn.Module:
    """Bags of `step` ids from rows of two, in one vector."""
    return Lambda(
        lambda m, i: m.e(i.flatten(), torch.arange(0, i.numel(), step)),
        e=nn.EmbeddingBag(4, 3, mode=mode),
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_for_each_example_in_one_tensor_is_exact(mode: str) -> None:
    check(bags(mode, 2), torch.tensor([[1, 1], [2, 3], [3, 0]]))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_several_examples_is_refused(mode: str) -> None:
    refused = pytest.raises(NotCoveredError, match="a bag holds ids of several examples")
    with dptorch.record(model := bags(mode, 4)), refused:
        model(torch.tensor([[1, 1], [2, 3], [3, 0], [0, 1]]))


@pytest.mark.parametrize("rows", [1, 4])
def test_adaptive_softmax(rows: int) -> None:
    """Its ``forward`` takes the rows of a cluster by ``nonzero().squeeze()``, which may be one."""
    torch.manual_seed(0)
    head = nn.AdaptiveLogSoftmaxWithLoss(16, 10, [2, 6], div_value=2)
    x = torch.randn(rows, 16)
    check(Lambda(lambda m, x: m.h.log_prob(x), h=head), x)
    for y in ([0, 5, 9, 1], [5, 3, 9, 4], [9, 0, 1, 1], [0, 1, 1, 0]):
        check(Lambda(lambda m, x, y: m.h(x, y).output, h=head), x, torch.tensor(y[:rows]))


@pytest.mark.slow
def test_every_layer_with_parameters_has_a_row() -> None:
    import inspect
    import re

    own = re.compile(r"Parameter\(|Linear\(|Layer\(|Encoder\(")
    found = {
        name
        for name, kind in vars(nn).items()
        if isinstance(kind, type)
        and issubclass(kind, nn.Module)
        and any(
            own.search(inspect.getsource(base))
            for base in kind.__mro__
            if issubclass(base, nn.Module) and base is not nn.Module
        )
        # A lazy layer is its namesake after the first forward.
        and not (name.startswith("Lazy") and name.removeprefix("Lazy") in LAYERS)
    }
    assert len(found) > 35
    assert found - ELSEWHERE.keys() == LAYERS.keys()


@pytest.mark.parametrize("name", ["Conv2d", "LSTM", "MultiheadAttention", "LayerNorm"])
def test_a_norm_without_one_parameter_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: leaving out the smallest parameter's norm fails the check."""

    def broken(tape: Tape) -> Tensor:
        squared = tape.squared_norms()
        smallest = min(squared, key=lambda n: tape.parameters[n].numel())
        return torch.stack([s for n, s in squared.items() if n != smallest]).sum(0).sqrt()

    module, shape = {
        "Conv2d": (nn.Conv2d(2, 3, 2), (2, 4, 4)),
        "LSTM": (Lambda(lambda m, x: m.r(x)[0], r=nn.LSTM(3, 2, batch_first=True)), (4, 3)),
        "MultiheadAttention": (
            Lambda(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)),
            (3, 4),
        ),
        "LayerNorm": (nn.LayerNorm(4), (3, 4)),
    }[name]
    x = torch.randn(3, *shape)
    check(module, x)
    monkeypatch.setattr(dptorch.Tape, "norms", broken)
    with pytest.raises(AssertionError, match=r"assert .* <= 1e-09"):
        check(module, x)
