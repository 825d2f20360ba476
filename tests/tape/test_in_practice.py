"""The tape under checkpointing, autocast, compilation, low precision, and odd ways of training."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.loop import norm_of, norms_of, one_example_loop, relative_error
from tests.tape.zoo import ZOO
from tests.tape.zoo.base import B, Case, Lambda, squares
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dptorch
from dptorch.errors import NotCoveredError
from dptorch.tape import Ragged, Recording, Tape
from dptorch.tape.provenance.tags import Reduced

D = 6


pytestmark = pytest.mark.usefixtures("float64")


def exact(tape: Tape, expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    formed = tape.per_example_gradients()
    assert relative_error(tape.norms(), norms_of(expected)) <= tolerance
    for name, gradient in expected.items():
        assert relative_error(formed[name], gradient) <= tolerance, name


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, D))
            for _ in range(3)
        )
        self.shared = nn.Parameter(torch.randn(D))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:

            def run(h: Tensor, block: nn.Module = block) -> Tensor:
                return h + block(h) * self.shared

            x = (
                run(x)
                if self.reentrant is None
                else checkpoint(run, x, use_reentrant=self.reentrant)
            )
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_is_exact_wherever_backward_runs(reentrant: bool, inside: bool) -> None:
    model, x = Checkpointed(reentrant), torch.randn(B, 3, D)
    plain = Checkpointed(None)
    plain.load_state_dict(model.state_dict())
    expected = one_example_loop(plain, (x,), squares)
    with dptorch.record(model) as tape:
        loss = squares(model, x).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    exact(tape, expected)


class BiasedBlock(nn.Module):
    """As of T5: the first makes a bias for all of parameters, others a constant that requires grad."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(D, D), nn.Parameter(torch.randn(D))
        self.bias = nn.Embedding(3, D) if first else None

    def forward(
        self, h: Tensor, bias: Tensor | None, empty: Tensor | None, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if bias is None:
            assert self.bias is not None
            bias = self.bias(torch.arange(3))[None] * self.scale
        if empty is None:
            empty = torch.zeros(1, 3, D)
            empty.requires_grad = True
        h = torch.where(keep[:, :, None], self.a(h) + bias, empty[:, -h.shape[1] :])
        return h.tanh() + empty, bias, empty


class Biased(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.reentrant = nn.Linear(D, D), reentrant
        self.blocks = nn.ModuleList(BiasedBlock(i == 0) for i in range(3))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        h, bias, empty = self.first(x), None, None
        for block in self.blocks:
            given = (h, bias, empty, keep)
            h, bias, empty = (
                block(*given)
                if self.reentrant is None
                else checkpoint(block, *given, use_reentrant=self.reentrant)
            )
        return h


@pytest.mark.parametrize("reentrant", [True, False])
def test_values_from_outside_of_a_checkpoint_are_exact(reentrant: bool) -> None:
    batch = (torch.randn(B, 3, D), torch.rand(B, 3) > 0.3)
    model, plain = Biased(reentrant), Biased(None)
    plain.load_state_dict(model.state_dict())
    expected = one_example_loop(plain, batch, squares)
    with dptorch.record(model) as tape:
        loss = squares(model, *batch).sum()
    loss.backward()
    exact(tape, expected)


def test_the_gradient_of_a_constant_of_the_forward_pass_is_zero() -> None:
    """It would be of all examples. Broken twin: without the check it is their sum."""
    kept: list[Tensor] = []

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        kept.append(torch.zeros(D, requires_grad=True))
        return m.a(x) + kept[-1]  # type: ignore[no-any-return, operator]

    model = Lambda(forward, a=nn.Linear(D, D))
    with dptorch.record(model):
        squares(model, torch.randn(B, D)).sum().backward()
    assert kept[0].grad is not None
    assert not kept[0].grad.any()
    squares(model, torch.randn(B, D)).sum().backward()
    assert kept[1].grad is not None
    assert kept[1].grad.abs().sum() > 1
    model.function = lambda m, x: m.a(x) + kept[1]  # of another forward pass: it may be trained
    with pytest.raises(NotCoveredError, match="no parameter"), dptorch.record(model):
        model(torch.randn(B, D))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_transformers_are_exact(reentrant: bool) -> None:
    case = ZOO["gpt2_tied"]()
    expected = one_example_loop(case.model, case.batch, case.loss)
    case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    case.model.train()
    with dptorch.record(case.model) as tape:
        loss = case.loss(case.model, *case.batch)
    loss.backward()
    exact(tape, expected)


def held_by_graph(model: nn.Module, x: Tensor) -> int:
    """Bytes that the recorded graph keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        dptorch.record(model),
        dptorch.tape.trusted_reads(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        loss = squares(model, x).sum()
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_its_saving(reentrant: bool) -> None:
    x = torch.randn(B, 50, D)
    plain, saving = held_by_graph(Checkpointed(None), x), held_by_graph(Checkpointed(reentrant), x)
    assert saving < 0.5 * plain


def test_autocast_gives_norms_in_float32() -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8))
    x, y = torch.randn(16, 32), torch.randint(0, 8, (16,))
    with dptorch.record(model) as tape, torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y, reduction="sum")
    loss.backward()
    norms = tape.norms()
    assert norms.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        expected = one_example_loop(
            model, (x, y), lambda m, a, b: F.cross_entropy(m(a), b, reduction="none")
        )
    assert relative_error(norms, norms_of(expected)) < 2e-2
    factors = (0.1 / norms).clamp(max=1)
    for i in range(16):
        one = tape.clipped_sum(factors * (torch.arange(16) == i))
        assert norm_of(one) <= 0.1 * (1 + 1e-5)
        assert all(v.dtype == torch.float32 for v in one.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(
        nn.Embedding(9, 16), nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4)
    )
    model = model.to(dtype)
    ids = torch.randint(0, 9, (8, 5))
    with dptorch.record(model) as tape:
        loss = squares(model, ids).float().sum()
    loss.backward()
    assert tape.norms().dtype == torch.float32
    expected = one_example_loop(model, (ids,), squares)
    truth = norms_of({name: g.float() for name, g in expected.items()})
    assert relative_error(tape.norms(), truth) < 3e-2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_exact(backend: str) -> None:
    """aot_eager makes custom autograd Functions, as inductor does, in which nothing can be followed."""
    model = nn.Sequential(nn.Linear(D, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    x = torch.randn(B, D)
    expected = one_example_loop(model, (x,), squares)
    compiled = torch.compile(model, backend=backend)
    compiled(x)  # compiled before it is recorded
    with dptorch.record(compiled) as tape:
        loss = squares(compiled, x).sum()
    loss.backward()
    exact(tape, {f"_orig_mod.{k}": v for k, v in expected.items()})


def test_a_layer_skipped_in_some_steps_and_lengths_that_change() -> None:
    model = Lambda(
        lambda m, x: m.b(m.a(x) if x.shape[1] > 3 else x), a=nn.Linear(D, D), b=nn.Linear(D, 2)
    )
    for length in (5, 2, 7):
        x = torch.randn(B, length, D)
        with dptorch.record(model) as tape:
            loss = squares(model, x).sum()
        loss.backward()
        exact(tape, one_example_loop(model, (x,), squares))


def test_forward_without_backward_and_without_gradients_keeps_nothing() -> None:
    model, x = nn.Linear(D, D), torch.randn(B, D)
    with dptorch.record(model) as tape:
        model(x)
        with torch.no_grad():
            model(x)
    assert not tape.fired
    with dptorch.record(model) as tape:
        loss = squares(model, x).sum()
    loss.backward()
    exact(tape, one_example_loop(model, (x,), squares))


def test_ignored_positions_equal_the_loop() -> None:
    """A mean over counted tokens is each example's own mean, whatever the others count."""
    model = nn.Sequential(nn.Embedding(9, D), nn.Linear(D, 9))
    ids = torch.randint(0, 9, (B, 5))
    target = ids.clone()
    target[0, 1:] = -100
    target[2, :2] = -100

    def loss(m: nn.Module, ids: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(m(ids).flatten(0, 1), target.flatten())

    expected = one_example_loop(model, (ids, target), loss)
    with dptorch.record(model) as tape:
        value = loss(model, ids, target)
        value.backward()
    exact(tape, {k: v / B for k, v in expected.items()})
    assert tape.loss == Reduced("mean")


@pytest.mark.parametrize("examples", [1, B])
def test_class_weights_scale_each_example(examples: int) -> None:
    """A weight is as much as it says, whichever classes the batch holds and however many examples."""
    model, weight = nn.Linear(D, 3), torch.tensor([0.1, 1.0, 5.0])
    x, y = torch.randn(examples, D), torch.arange(examples) % 3

    def weighted(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y, weight=weight, reduction="none")

    expected = one_example_loop(model, (x, y), weighted)
    with dptorch.record(model) as tape:
        F.cross_entropy(model(x), y, weight=weight).backward()
    exact(tape, {k: v / examples for k, v in expected.items()})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_of_losses(reduction: str) -> None:
    case = ZOO["mlp"]()
    x, y = case.batch
    expected = one_example_loop(case.model, case.batch, case.loss)
    with dptorch.record(case.model) as tape:
        F.cross_entropy(case.model(x), y, reduction=reduction).backward()
    scale = 1 / B if reduction == "mean" else 1.0
    exact(tape, {k: v * scale for k, v in expected.items()})
    assert tape.loss == Reduced(reduction)


@pytest.mark.parametrize("name", ["gpt2_tied", "bert", "resnet_groupnorm", "lstm_and_gru", "vit"])
def test_micro_batches_add_up(name: str) -> None:
    case = ZOO[name]()
    with dptorch.record(case.model) as tape:
        case.loss(case.model, *case.batch).sum().backward()
    whole = tape.clipped_sum(tape.norms().reciprocal())
    parts: dict[str, Tensor] = {}
    for half in (slice(0, 1), slice(1, B)):
        batch = tuple(t[half] for t in case.batch)
        with dptorch.record(case.model) as tape:
            case.loss(case.model, *batch).sum().backward()
        for key, value in tape.clipped_sum(tape.norms().reciprocal()).items():
            parts[key] = parts.get(key, 0) + value
    for key, value in whole.items():
        assert relative_error(parts[key], value) <= 1e-9


def test_rows_of_ids_and_offsets() -> None:
    """EmbeddingBag's own form: ids in one row, and where each example's begin."""
    model = nn.EmbeddingBag(7, 4, mode="mean")
    ids, offsets = torch.tensor([1, 1, 2, 5, 0, 3, 3]), torch.tensor([0, 3, 4])
    dims = {"input": Ragged("offsets", "offsets")}
    with dptorch.record(model, batch_dims=dims) as tape:
        loss = model(ids, offsets).square().sum()
    loss.backward()
    rows = [ids[0:3], ids[3:4], ids[4:]]
    expected = []
    for row in rows:
        value = model(row[None]).square().sum()
        expected.append(torch.autograd.grad(value, model.weight)[0])
    exact(tape, {"weight": torch.stack(expected)})


def generic_ops(name: str) -> set[str]:
    case: Case = ZOO[name]()
    recording = Recording(case.model)
    inputs = [recording.tag_batch(t) for t in case.batch]
    with recording:
        case.loss(case.model, *inputs)
    return {op for op, _ in recording.generic_ops}


FACTORED = """gpt2_tied bert vit llama t5_relative_bias swin_windows resnet_groupnorm timm_beit
timm_convnext lora_on_gpt2 lstm_and_gru rnn_cells packed_sequences"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORED.split())
def test_common_models_need_no_generic_rule(name: str) -> None:
    assert generic_ops(name) == set()


def test_loss_weights_follow_arithmetic() -> None:
    model, x = nn.Linear(D, D), torch.randn(B, D)
    losses: list[tuple[Callable[[Tensor], Tensor], Reduced]] = [
        (lambda o: o.square().mean(), Reduced("mean")),
        (lambda o: o.square().sum(), Reduced("sum")),
        (lambda o: o.square().sum() / B, Reduced("sum", (1 / B,))),
        (lambda o: 3 * o.square().sum(1).mean() - 0.5, Reduced("mean", (3.0,))),
    ]
    for loss, found in losses:
        with dptorch.record(model) as tape:
            loss(model(x)).backward()
        assert tape.loss == found
