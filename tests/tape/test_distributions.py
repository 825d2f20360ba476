"""Every distribution of torch.distributions, with parameters from the examples and of the model alone.

The oracle differentiates one loss after another of an ordinary run with the same random numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributions as td
from tests.oracles.loop import one_example_loop, relative_error
from tests.tape.zoo.base import Lambda
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dptorch
from dptorch import PrivacyEngine
from dptorch.errors import NotCoveredError, PrivacyError
from dptorch.tape.recording.batches import Batch
from dptorch.tape.recording.parameter_graph import parameters_behind
from dptorch.tape.recording.tensor_states import TensorStates

B, D = 4, 3
Make = Callable[[Tensor, Tensor], td.Distribution]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# h [B, D] in (0.1, 0.9) carries the examples, p [D] in (0.4, 0.7) is a parameter.
DISTRIBUTIONS: dict[str, Make] = {
    "Bernoulli": lambda h, p: td.Bernoulli(logits=h * p),
    "Beta": lambda h, p: td.Beta(h, p),
    "Binomial": lambda h, p: td.Binomial(3, logits=h - p),
    "Categorical": lambda h, p: td.Categorical(logits=h + p),
    "Cauchy": lambda h, p: td.Cauchy(h, p),
    "Chi2": lambda h, p: td.Chi2(h + p),
    "ContinuousBernoulli": lambda h, p: td.ContinuousBernoulli(logits=h * p),
    "Dirichlet": lambda h, p: td.Dirichlet(h * 3 + p),
    "Exponential": lambda h, p: td.Exponential(h * p),
    "FisherSnedecor": lambda h, p: td.FisherSnedecor(h + 1, p + 3),
    "Gamma": lambda h, p: td.Gamma(h, p),
    "GeneralizedPareto": lambda h, p: td.GeneralizedPareto(h * 0.01, p, h),
    "Geometric": lambda h, p: td.Geometric(logits=h * p),
    "Gumbel": lambda h, p: td.Gumbel(h, p),
    "HalfCauchy": lambda h, p: td.HalfCauchy(h * p),
    "HalfNormal": lambda h, p: td.HalfNormal(h * p),
    "Independent": lambda h, p: td.Independent(td.Normal(h, p), 1),
    "InverseGamma": lambda h, p: td.InverseGamma(h + 1, p),
    "Kumaraswamy": lambda h, p: td.Kumaraswamy(h, p),
    "LKJCholesky": lambda h, p: td.LKJCholesky(3, h[:, 0] * p[0]),
    "Laplace": lambda h, p: td.Laplace(h, p),
    "LogNormal": lambda h, p: td.LogNormal(h, p),
    "LogisticNormal": lambda h, p: td.LogisticNormal(h, p),
    "LowRankMultivariateNormal": lambda h, p: td.LowRankMultivariateNormal(
        h, (h * p)[..., None], h * 0.5 + p
    ),
    "MixtureSameFamily": lambda h, p: td.MixtureSameFamily(
        td.Categorical(logits=h), td.Normal(h * 1.5, h * p)
    ),
    "Multinomial": lambda h, p: td.Multinomial(4, logits=h * p),
    "MultivariateNormal": lambda h, p: td.MultivariateNormal(
        h, scale_tril=torch.diag_embed(h * p)
    ),
    "NegativeBinomial": lambda h, p: td.NegativeBinomial(p, logits=h),
    "Normal": lambda h, p: td.Normal(h, p),
    "OneHotCategorical": lambda h, p: td.OneHotCategorical(logits=h * p),
    "OneHotCategoricalStraightThrough": lambda h, p: td.OneHotCategoricalStraightThrough(
        logits=h * p
    ),
    "Pareto": lambda h, p: td.Pareto(p * 0.1, h),
    "Poisson": lambda h, p: td.Poisson(h * p),
    "RelaxedBernoulli": lambda h, p: td.RelaxedBernoulli(torch.tensor(0.7), logits=h * p),
    "RelaxedOneHotCategorical": lambda h, p: td.RelaxedOneHotCategorical(
        torch.tensor(0.7), logits=h * p
    ),
    "StudentT": lambda h, p: td.StudentT(p + 3, h, p),
    "TransformedDistribution": lambda h, p: td.TransformedDistribution(
        td.Normal(h, p), [td.transforms.TanhTransform(), td.transforms.AffineTransform(p, h)]
    ),
    "Uniform": lambda h, p: td.Uniform(h - 1, h + p),
    "VonMises": lambda h, p: td.VonMises(h, p),
    "Weibull": lambda h, p: td.Weibull(h, p),
    "Wishart": lambda h, p: td.Wishart(
        h[:, 0] + 3, covariance_matrix=torch.diag_embed(h * p)
    ),
    "parameter as the location": lambda h, p: td.Normal(p, h),
}  # fmt: skip


def model_of(f: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Lambda(
        lambda m, x: f(torch.sigmoid(m.a(x)) * 0.8 + 0.1, m.p),
        a=nn.Linear(5, D),
        p=nn.Parameter(torch.rand(D) * 0.3 + 0.4),
    )


def check(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One loss for each example, from what `f` makes of h and p; against one derivative each."""
    model, x = model_of(f), torch.randn(B, 5)

    def losses() -> Tensor:
        torch.manual_seed(1)
        return model(x).reshape(B, -1).square().sum(1)

    parameters = dict(model.named_parameters())
    values = losses()
    assert values.requires_grad
    each = [
        torch.autograd.grad(v, list(parameters.values()), retain_graph=True, allow_unused=True)
        for v in values
    ]
    with dptorch.record(model) as tape:
        losses().sum().backward()
    found = tape.per_example_gradients()
    for k, (name, p) in enumerate(parameters.items()):
        rows = [torch.zeros_like(p) if g[k] is None else g[k] for g in each]
        expected = torch.stack(rows)
        got = found.get(name, torch.zeros_like(expected))
        assert relative_error(got, expected) <= 1e-9, name


def samples_of(name: str) -> Tensor:
    """Values in the support, drawn with constants."""
    torch.manual_seed(2)
    h, p = torch.rand(B, D) * 0.8 + 0.1, torch.rand(D) * 0.3 + 0.4
    with torch.no_grad():
        return DISTRIBUTIONS[name](h, p).sample()


def test_every_distribution_is_here() -> None:
    every = {
        n for n, c in vars(td).items()
        if inspect.isclass(c) and issubclass(c, td.Distribution)
    } - {"Distribution", "ExponentialFamily"}  # fmt: skip
    assert every <= set(DISTRIBUTIONS)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_log_prob(name: str) -> None:
    value = samples_of(name)
    if name in ("GeneralizedPareto", "Pareto", "Uniform", "TransformedDistribution"):
        value = value.clamp(0.2, 0.5)  # within the support whatever h and p are
    check(lambda h, p: DISTRIBUTIONS[name](h, p).log_prob(value))


RSAMPLE = [
    n
    for n in DISTRIBUTIONS
    if n != "Wishart"
    and DISTRIBUTIONS[n](torch.rand(B, D) * 0.8 + 0.1, torch.rand(D) * 0.3 + 0.4).has_rsample
]


@pytest.mark.parametrize("name", RSAMPLE)
def test_rsample(name: str) -> None:
    check(lambda h, p: DISTRIBUTIONS[name](h, p).rsample())


def test_wishart_draws_the_whole_batch_again_where_one_sample_is_singular() -> None:
    with pytest.raises(PrivacyError):
        check(lambda h, p: DISTRIBUTIONS["Wishart"](h, p).rsample())


class Gaussian(nn.Module):
    """Returns a parameter as it is, beside what it makes of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(5, D), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), self.log_std


def negative_log_likelihood(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mean, log_std = m(x)
    return -td.Normal(mean, log_std.exp()).log_prob(y).sum(1)


def test_a_parameter_that_the_loss_uses_first() -> None:
    """The loss takes the exponential of a parameter that the model returned, after the forward."""
    model = Gaussian()
    x, y = torch.randn(B, 5), torch.randn(B, D)
    expected = one_example_loop(model, [x, y], negative_log_likelihood)
    engine = PrivacyEngine(
        model, sample_rate=1.0, sample_size=B, steps=1, noise_multiplier=0.0, target_delta=1e-3,
        max_grad_norm=1e9, seed=0,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for batch in engine.loader(TensorDataset(x, y)):
        negative_log_likelihood(model, *batch).mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert relative_error(p.grad, expected[name].mean(0)) <= 1e-9, name


def test_a_term_of_a_parameter_alone_is_refused_with_a_way_out() -> None:
    model = Gaussian()
    with dptorch.record(model):
        mean, log_std = model(torch.randn(B, 5))
        with pytest.raises(NotCoveredError, match="add the term to each example's loss"):
            mean.square().sum() + log_std.exp().sum() * B


def test_what_is_behind_a_tensor() -> None:
    p, q, x = (torch.randn(D, requires_grad=True) for _ in range(3))
    followed = {id(p): "p", id(q): "q"}
    states = TensorStates(nn.Linear(1, 1), Batch())
    assert parameters_behind((p.exp() * q)[1:], followed, states) == {id(p), id(q)}
    assert parameters_behind(p.exp() * x, followed, states) is None  # x may be an example
    states.depth = 1
    states.note_own_leaf(x)
    assert parameters_behind(p.exp() * x, followed, states) == {id(p)}
    assert parameters_behind(x.exp(), followed, states) == set()
    model = nn.Linear(5, D)
    with dptorch.record(model):
        out = model(torch.randn(B, 5))
    named = {id(v): n for n, v in model.named_parameters()}
    assert parameters_behind(out, named, states) is None


ENTROPY = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "Cauchy",
    "Dirichlet",
    "Exponential",
    "Gamma",
    "Gumbel",
    "Laplace",
    "MultivariateNormal",
    "Normal",
    "StudentT",
    "Weibull",
]


@pytest.mark.parametrize("name", ENTROPY)
def test_entropy(name: str) -> None:
    check(lambda h, p: DISTRIBUTIONS[name](h, h * p).entropy())


KL = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Cauchy",
    "ContinuousBernoulli",
    "Dirichlet",
    "Exponential",
    "Gamma",
    "Geometric",
    "Gumbel",
    "HalfNormal",
    "Laplace",
    "LogNormal",
    "LowRankMultivariateNormal",
    "MultivariateNormal",
    "Normal",
    "OneHotCategorical",
    "Poisson",
    "Uniform",
    "Independent",
]


@pytest.mark.parametrize("name", KL)
def test_kl_divergence_from_a_constant_and_to_itself_elsewhere(name: str) -> None:
    torch.manual_seed(3)
    h0, p0 = torch.rand(B, D) * 0.8 + 0.1, torch.rand(D) * 0.3 + 1.4

    def divergence(h: Tensor, p: Tensor) -> Tensor:
        return td.kl_divergence(DISTRIBUTIONS[name](h, p), DISTRIBUTIONS[name](h0, p0))

    check(divergence)


def test_an_oracle_sees_a_distribution_that_mixes() -> None:
    with pytest.raises((AssertionError, PrivacyError)):
        check(lambda h, p: td.Normal(h - h.mean(0), p).log_prob(torch.zeros(B, D)))
