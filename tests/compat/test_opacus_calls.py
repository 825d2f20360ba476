"""Arguments and calls of Opacus, one by one; Opacus stands beside where it is sound."""

import warnings
from typing import Any

import opacus
import pytest
import torch
from opacus.accountants.utils import get_noise_multiplier as their_noise_multiplier
from opacus.grad_sample import GradSampleModule as TheirGradSampleModule
from opacus.utils import per_sample_gradients_utils as their_gradients
from opacus.utils.packed_sequences import compute_seq_lengths as their_lengths
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, TensorDataset

import dptorch
from dptorch.compat.opacus import PrivacyEngine, grad_sample, layers
from dptorch.compat.opacus.accountants.utils import get_noise_multiplier
from dptorch.compat.opacus.data_loader import DPDataLoader, switch_generator
from dptorch.compat.opacus.utils import packed_sequences
from dptorch.compat.opacus.utils import per_sample_gradients_utils as gradients
from dptorch.compat.opacus.utils.uniform_sampler import UniformWithReplacementSampler
from dptorch.errors import ConfigurationError, ExamplesMixError, PrivacyWarning
from dptorch.tape import Ragged
from tests.compat.opacus_setup import data_for, mlp, private, train


def test_secure_mode_changes_nothing() -> None:
    found = []
    for secure in (False, True):
        _, *made = private(engine=PrivacyEngine(secure_mode=secure), max_grad_norm=0.1)
        found.append(train(*made))
    assert torch.equal(*found)


def test_sums_are_divided_by_the_mean_batch_size() -> None:
    """25 examples in batches of 8 are 4 steps of 6.25; Opacus divides by 6."""

    def divisor(make: Any) -> float:
        module = nn.Linear(3, 1, bias=False)
        _, optimizer, _ = make.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(torch.randn(25, 3)), batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        return float(optimizer.expected_batch_size)

    assert divisor(PrivacyEngine()) == 6.25
    assert divisor(opacus.PrivacyEngine()) == 6


@pytest.mark.parametrize("mode", ["no_op", "ghost_fsdp", "ghost_tp"])
def test_modes_that_cannot_be_vouched_for_are_refused(mode: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{mode}.*Use 'hooks'"):
        private(grad_sample_mode=mode)


def test_a_model_that_is_not_wrapped_is_the_model_itself() -> None:
    module = mlp()
    engine, returned, optimizer, loader = private(
        module=module, wrap_model=False, noise_multiplier=1.0
    )
    assert returned is module
    train(returned, optimizer, loader)
    assert engine.get_epsilon(1e-5) > 0


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_noise_for_a_target_is_at_most_that_of_opacus(accountant: str) -> None:
    settings: dict[str, Any] = {
        "target_epsilon": 3.0, "target_delta": 1e-5, "sample_rate": 0.02, "epochs": 4,
        "accountant": accountant,
    }  # fmt: skip
    mine, theirs = get_noise_multiplier(**settings), their_noise_multiplier(**settings)
    assert 0.97 * theirs < mine <= theirs


def test_a_sampler_has_the_batches_of_an_epoch() -> None:
    """``int(1 / rate)`` is 92 for 93 examples; every example is drawn at the rate."""
    rate = 1 / 93
    assert int(1 / rate) == 92
    sampler = UniformWithReplacementSampler(num_samples=93, sample_rate=rate)
    assert len(list(sampler)) == len(sampler) == 93
    loader = DataLoader(data_for(mlp), batch_size=8)
    mine = DPDataLoader.from_data_loader(loader)
    theirs = opacus.data_loader.DPDataLoader.from_data_loader(loader)
    assert (len(mine), mine.sample_rate) == (len(theirs), theirs.sample_rate) == (3, 1 / 3)
    assert all(x.shape[1:] == (6,) for x, _ in mine)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "MultiheadAttention"])
def test_layers_are_those_of_torch(name: str) -> None:
    """And compute what Opacus's replacements do, by whose state they load."""
    mine, theirs = getattr(layers, f"DP{name}"), getattr(opacus.layers, f"DP{name}")
    assert mine is getattr(nn, name)
    torch.manual_seed(0)
    a, b = (kind(8, 2) if name == "MultiheadAttention" else kind(8, 5) for kind in (mine, theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b.load_state_dict(a.state_dict())
    x = torch.randn(4, 3, 8)
    inputs = (x, x, x) if name == "MultiheadAttention" else (x,)
    torch.testing.assert_close(a(*inputs)[0], b(*inputs)[0])


# -- per-example gradients for study -------------------------------------------------------------------


def bags() -> tuple[torch.Tensor, torch.Tensor]:
    """No id twice in a bag: see `test_an_id_that_repeats_in_a_bag_counts_each_time`."""
    ids = [torch.randperm(9)[:size] for size in (3, 1, 4, 2)]
    return torch.cat(ids), torch.tensor([0, 3, 4, 8])


LAYERS: dict[str, tuple[Any, Any, bool]] = {  # module, batch, batch_first
    "linear": (lambda: nn.Linear(5, 3), lambda: torch.randn(4, 2, 5), True),
    "convolution": (lambda: nn.Conv2d(2, 4, 3, groups=2), lambda: torch.randn(3, 2, 6, 6), True),
    "norm": (lambda: nn.GroupNorm(2, 4), lambda: torch.randn(3, 4, 5), True),
    "embedding": (lambda: nn.Embedding(9, 3), lambda: torch.randint(0, 9, (4, 5)), True),
    "bag": (lambda: nn.EmbeddingBag(9, 3, mode="mean"), bags, True),
    "time first": (lambda: nn.Linear(5, 3), lambda: torch.randn(2, 4, 5), False),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_layers_are_those_of_opacus(name: str, reduction: str) -> None:
    torch.manual_seed(0)
    make, batch, first = LAYERS[name]
    module, x = make(), batch()
    mine = gradients.compute_opacus_grad_sample(x, module, first, reduction)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        theirs = their_gradients.compute_opacus_grad_sample(x, module, first, reduction)
    finally:
        torch.use_deterministic_algorithms(deterministic)  # Opacus's leaves them on
    assert mine.keys() == theirs.keys()
    for parameter, expected in theirs.items():
        torch.testing.assert_close(mine[parameter], expected)
    if name != "bag":
        loop = gradients.compute_microbatch_grad_sample(x, module, first, reduction)
        assert all(torch.allclose(loop[n], mine[n], atol=1e-6) for n in mine)
        assert gradients.check_per_sample_gradients_are_correct(x, module, batch_first=first)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_an_id_that_repeats_in_a_bag_counts_each_time(mode: str) -> None:
    """A loop over single examples is the judge. Opacus adds by an index, which takes a repeated id
    once, and has nothing for "max": it clips too little, by the number of repetitions."""
    torch.manual_seed(0)
    module = nn.EmbeddingBag(6, 3, mode=mode)
    ids, offsets = torch.tensor([1, 1, 2, 3, 4, 5, 5, 5]), torch.tensor([0, 3, 5])
    loop = []
    for bag in ids.tensor_split(offsets[1:]):
        module.zero_grad()
        module(bag, torch.tensor([0])).sum().backward()
        loop.append(module.weight.grad)
    expected = torch.stack(loop)
    with dptorch.record(module, batch_dims={"input": Ragged("offsets", "offsets")}) as tape:
        out = module(ids, offsets)
    out.sum().backward()
    torch.testing.assert_close(tape.per_example_gradients()["weight"], expected)
    private = TheirGradSampleModule(module, loss_reduction="sum")
    private(ids, offsets).sum().backward()
    ratio = module.weight.grad_sample.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    wrong = {"sum": [0.4**0.5, 1, 1 / 3], "mean": [0.4**0.5, 1, 1 / 3], "max": [0, 0, 0]}[mode]
    torch.testing.assert_close(ratio, torch.tensor(wrong, dtype=ratio.dtype))


def test_a_module_that_mixes_examples_has_no_gradients_of_single_examples() -> None:
    x, module = torch.randn(4, 3, 5), nn.BatchNorm1d(3)
    with pytest.raises(ExamplesMixError):
        gradients.compute_opacus_grad_sample(x, module)
    with pytest.raises(RuntimeError, match="no examples"):
        gradients.check_per_sample_gradients_are_correct(torch.randn(0, 3), nn.Linear(3, 1))


class Outputs(nn.Module):
    """A recurrent layer without its hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.rnn(x)[0]


@pytest.mark.parametrize("ordered", [True, False])
def test_packed_sequences_are_taken_apart_as_in_opacus(ordered: bool) -> None:
    torch.manual_seed(0)
    packed = packed_sequences._gen_packed_data(5, 7, 3, True, ordered)
    assert isinstance(packed, PackedSequence)
    lengths = packed_sequences.compute_seq_lengths(packed.batch_sizes)
    assert lengths == their_lengths(packed.batch_sizes)
    mine = gradients.unpack_packedsequences(packed)
    for a, b in zip(mine, their_gradients.unpack_packedsequences(packed), strict=True):
        assert torch.equal(a, b)
    assert gradients.check_per_sample_gradients_are_correct(packed, Outputs())


def test_a_sampler_for_a_layer_is_not_used_and_says_so() -> None:
    def sampler(*args: Any) -> None:
        raise AssertionError

    with pytest.warns(PrivacyWarning, match=r"registered for Linear, Bilinear is not used"):
        assert grad_sample.register_grad_sampler([nn.Linear, nn.Bilinear])(sampler) is sampler
    assert gradients.check_per_sample_gradients_are_correct(torch.randn(4, 3), nn.Linear(3, 1))


def test_a_loader_of_another_generator_has_its_order() -> None:
    data = TensorDataset(torch.arange(24.0))

    def order(switch: Any, loader: Any, seed: int) -> list[float]:
        given = switch(data_loader=loader, generator=torch.Generator().manual_seed(seed))
        return torch.cat([x for (x,) in given]).tolist()

    def shuffled() -> DataLoader[Any]:
        return DataLoader(data, batch_size=8, shuffle=True)

    mine = order(switch_generator, shuffled(), 3)
    assert mine == order(opacus.data_loader.switch_generator, shuffled(), 3)
    assert mine != order(switch_generator, shuffled(), 4)
    poisson = DPDataLoader(data, sample_rate=0.25)
    assert order(switch_generator, poisson, 3) == order(switch_generator, poisson, 3)
    with pytest.raises(ConfigurationError, match="shuffle=True"):
        order(switch_generator, DataLoader(data, batch_size=8), 3)
