"""Members without names are those with names."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dptorch.tape.provenance.members import buffers_of, parameters_of


def ids(tensors: list[Tensor]) -> set[int]:
    return {id(t) for t in tensors}


def test_members_of_shared_missing_and_circular_modules() -> None:
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.ModuleList([shared, nn.Linear(3, 3, bias=False)]))
    model.register_module("nothing", None)
    model.register_buffer("empty", None)
    model[1].register_module("parent", model)
    assert ids(parameters_of(model)) == ids(list(model.parameters()))
    assert ids(buffers_of(model)) == ids(list(model.buffers()))
    assert len(ids(parameters_of(model))) == 3


def test_a_model_that_says_what_its_members_are_is_asked() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.register_buffer("c", torch.zeros(1))

        def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
            yield from self.a.named_parameters()

        def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
            yield from ()

    model = Own()
    assert ids(parameters_of(model)) == ids(list(model.a.parameters()))
    assert buffers_of(model) == []
