"""What is trained is found without names as it is with them."""

from collections.abc import Iterator

from torch import Tensor, nn

from dptorch.engine.private_step import trained_by


def named(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}


def test_parameters_of_shared_missing_and_circular_modules() -> None:
    shared = nn.BatchNorm1d(3)
    frozen = nn.Linear(3, 3).requires_grad_(False)
    model = nn.Sequential(shared, nn.ModuleList([shared, nn.Linear(3, 3, bias=False)]), frozen)
    model.register_module("nothing", None)
    model[1].register_module("parent", model)
    assert trained_by(model) == named(model)
    assert len(trained_by(model)) == 3


def test_a_model_that_says_what_its_parameters_are_is_asked() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
            yield from self.a.named_parameters()

    model = Own()
    assert trained_by(model) == named(model) == {id(p) for p in model.a.parameters()}
