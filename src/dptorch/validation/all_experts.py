"""A mixture of experts whose result for one example does not hang on where the others are routed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AllExperts", "asks_who_is_hit"]


class AllExperts(nn.ModuleDict):
    """The experts of a Switch Transformer, each of which sees every token.

    transformers' own module first asks which experts any token of the batch goes to, and runs those.
    Here all run, and what a token was not routed to counts 0: the same result, for as many times the
    work as there are experts. Modules and parameters keep their names.

    Guarantees:
        Outputs are those of the module it replaces. Held by
        ``test_models_of_transformers_that_mix_and_need_not``.
    """

    def forward(
        self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
    ) -> Tensor:
        """[n, hidden] tokens, [n, 1, experts] of 0 and 1, [n, 1] -> [n, hidden]."""
        out = torch.zeros_like(hidden_states)
        for i, expert in enumerate(self.values()):
            chosen = selected_experts[:, 0, i, None].to(hidden_states.dtype)
            out = out + (chosen * routing_weights * expert(hidden_states)).to(out.dtype)
        return out


def asks_who_is_hit(module: nn.Module) -> bool:
    """Whether a module is transformers' own, which loops over the experts that the batch hits."""
    kind = type(module)
    library = kind.__module__.partition(".")[0]
    return (library, kind.__name__) == ("transformers", "SwitchTransformersExperts")
