"""What holds for every rule and layer, and layers drawn at random: for the property tests."""

from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from tests.oracles.loop import Loss, norms_of, one_example_loop, relative_error
from torch import Tensor, nn

import dptorch
from dptorch.tape.provenance.tags import Reduced


def weighed(model: nn.Module, *batch: Tensor) -> Tensor:
    """One loss an example, in which every output element counts differently."""
    out = model(*batch)
    out = out.reshape(out.shape[0], -1)
    return (out * torch.linspace(0.5, 1.5, out.shape[1])).sum(1) + 0.1 * out.square().sum(1)


def check(model: nn.Module, *batch: Tensor, loss: Loss = weighed) -> None:
    """The tape equals the loop, whether the loss is summed or averaged over the examples."""
    expected = one_example_loop(model, batch, loss)
    norms = norms_of(expected)
    b = batch[0].shape[0]
    for reduction in ("sum", "mean"):
        with dptorch.record(model) as tape:
            getattr(loss(model, *batch), reduction)().backward()
        if b > 1:  # the loss of one example is its sum and its mean
            assert tape.loss == Reduced(reduction)
        scale = b if reduction == "mean" else 1
        formed = tape.per_example_gradients()
        for name, gradient in expected.items():
            assert relative_error(scale * formed[name], gradient) <= 1e-9, (reduction, name)
        assert relative_error(scale * tape.norms(), norms) <= 1e-9, reduction
        c = torch.rand(b)
        clipped = tape.clipped_sum(scale * c)
        for name, gradient in expected.items():
            truth = torch.tensordot(c, gradient, 1)
            assert relative_error(clipped[name], truth) <= 1e-9, (reduction, name)


def convolution(
    rank: int, transposed: bool, bias: bool, data: st.DataObject
) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution and the shape of one of its inputs."""
    groups = data.draw(st.integers(1, 3))
    inputs, outputs = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    per_dim = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(rank))
    kernel, stride, dilation = per_dim(1, 3), per_dim(1, 2), per_dim(1, 2)
    size = tuple(
        d * (k - 1) + 1 + e for d, k, e in zip(dilation, kernel, per_dim(0, 3), strict=True)
    )
    settings: dict[str, Any] = {"dilation": dilation, "groups": groups, "bias": bias}
    if transposed:
        extra = tuple(
            min(e, max(s, d) - 1) for e, s, d in zip(per_dim(0, 1), stride, dilation, strict=True)
        )
        settings |= {"stride": stride, "padding": per_dim(0, 1), "output_padding": extra}
        if any(
            (n - 1) * s - 2 * p + d * (k - 1) + e + 1 < 1
            for n, s, p, d, k, e in zip(
                size, stride, settings["padding"], dilation, kernel, extra, strict=True
            )
        ):
            assume(False)
    elif data.draw(st.booleans()):
        settings |= {"padding": data.draw(st.sampled_from(["same", "valid"]))}
    else:
        mode = data.draw(st.sampled_from(["zeros", "replicate"]))
        settings |= {"stride": stride, "padding": per_dim(0, 2), "padding_mode": mode}
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    return kind(inputs, outputs, kernel, **settings), (inputs, *size)
