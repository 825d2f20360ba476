"""private_vision, by name and call. Change ``from private_vision`` to
``from dptorch.compat.private_vision``. Its command is ``python -m dptorch.compat.private_vision``.

What each argument means here, where that differs: `docs/migrating.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import Unpack

from dptorch.compat.arguments import known_arguments
from dptorch.compat.attached_engine import LossVectorEngine, automatic_clipping
from dptorch.errors import one_of, warn
from dptorch.plan import PlanSettings

__all__ = ["PrivacyEngine"]

_FUNCTIONS = {"vanilla": "abadi", "global": "global", "autov": "normalised", "autos": "automatic"}
_ACCOUNTING = ("rdp_cks", "rdp", "glw", "gdp", "all")


class PrivacyEngine(LossVectorEngine):
    """private_vision's engine: give ``optimizer.step(loss=loss)`` one loss for each example.

    ``optimizer.virtual_step(loss=loss)`` adds a part of the batch. ``backward()`` is not called.

    Args:
        module, named_params, record_snr, settings: see `dptorch.compat.attached_engine.AttachedEngine`.
        max_grad_norm: bound on one example's gradient.
        target_delta: by default 1 / (2 * sample_size), as in private_vision.
        alphas, eps_error: accepted: the accountants here have orders and errors of their own.
        fp16: accepted: give a scaled loss with ``scale=``.
        numerical_stability_constant: γ of "autos", 0.01 or 0; the others need none.
        ghost_clipping, mixed: (True, True) is mixed ghost clipping, (True, False) ghost clipping, and
            False forms every example's gradient. All give the same gradients.
        accounting_mode: "rdp_cks" and "rdp" (both are converted the tighter way), "glw", "gdp" or
            "all". "gdp" promises too much: noise is calibrated by numerical composition instead.
        clip_function: "vanilla" (Abadi), "global" (keep or drop), "autov" (C / n), "autos"
            (C / (n + γ)).
        seed: see `dptorch.PrivacyEngine`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> optimizer = torch.optim.Adam(params=model.parameters(), lr=1e-4)
        >>> privacy_engine = PrivacyEngine(
        ...     model, batch_size=16, sample_size=64, epochs=3, max_grad_norm=0.1, target_epsilon=3,
        ...     ghost_clipping=True, mixed=True)
        >>> privacy_engine.attach(optimizer)
        >>> labels = torch.randint(0, 2, (64,))
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 1, 3, 3), labels)
        >>> for x, y in privacy_engine.loader(data, max_physical_batch_size=8):
        ...     loss = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        ...     optimizer.step(loss=loss)
        >>> privacy_engine.steps
        4
    """

    @known_arguments
    def __init__(
        self,
        module: nn.Module,
        *,
        alphas: Sequence[float] | None = None,
        record_snr: bool = True,
        named_params: Sequence[tuple[str, Tensor]] | None = None,
        fp16: bool = False,
        numerical_stability_constant: float | None = None,
        ghost_clipping: bool = True,
        mixed: bool = True,
        accounting_mode: str = "rdp_cks",
        eps_error: float = 0.05,
        clip_function: str = "vanilla",
        seed: int | None = None,
        **settings: Unpack[PlanSettings],
    ) -> None:
        function = _FUNCTIONS[one_of("clip_function", clip_function, _FUNCTIONS)]
        if clip_function == "autos":
            function = automatic_clipping(numerical_stability_constant)
        if accounting_mode == "gdp":
            warn(
                "accounting_mode='gdp' is a limit and no bound: it promises more than holds. Noise is "
                "calibrated by numerical composition, and get_privacy_spent() gives its 'eps_upper' "
                "beside 'eps_gdp'."
            )
        settings["clipping_fn"] = function
        mode = ("MixGhostClip" if mixed else "ghost") if ghost_clipping else "non-ghost"
        super().__init__(
            module,
            default_delta=lambda n: 1 / (2 * n),
            accounting_mode=accounting_mode,
            modes=_ACCOUNTING,
            named_params=named_params,
            record_snr=record_snr,
            clipping_mode=mode,
            seed=seed,
            **settings,
        )
        self.alphas = alphas
        self.eps_error = eps_error
        self.fp16 = fp16
        self.clipping_mode = mode
        self.clip_function = clip_function
