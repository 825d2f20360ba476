"""Convert what mixes examples: BatchNorm, tracked InstanceNorm, experts of Switch Transformers.

Shape legend: N examples, C channels, G groups of channels, ... space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from dptorch.errors import ConfigurationError, one_of

__all__ = ["Change", "FrozenBatchNorm", "Preparation", "preparation", "prepare"]

BATCHNORM = ("auto", "group", "frozen")
_GROUP_SIZE = 16
GroupsOf = Callable[[_BatchNorm], int]
_FEW = 4  # channels below which a normalised [N, C] row says next to nothing


@dataclass(frozen=True)
class Change:
    """One converted module.

    Attributes:
        module: its name in the model, "" for the model itself.
        before, after: class names.
        detail: what was kept and what was not.
    """

    module: str
    before: str
    after: str
    detail: str


@dataclass(frozen=True)
class Preparation:
    """What `prepare` changes in a model; ``print`` it.

    Attributes:
        changes: one for each converted module, in the model's order.
    """

    changes: tuple[Change, ...]

    def __str__(self) -> str:
        if not self.changes:
            return "dptorch.prepare: nothing to change."
        n = len(self.changes)
        lines = [f"dptorch.prepare changed {n} module{'s' if n > 1 else ''}:"]
        groups: dict[tuple[str, str, str], list[str]] = {}
        for c in self.changes:
            groups.setdefault((c.before, c.after, c.detail), []).append(c.module or "(the model)")
        for (before, after, detail), names in groups.items():
            lines.append(f"  {before} -> {after} ({detail}): {', '.join(names)}")
        return "\n".join(lines)


class FrozenBatchNorm(nn.Module):
    """BatchNorm with fixed statistics, in training too: an affine map of each channel.

    Parameters and buffers have BatchNorm's names, so checkpoints fit both ways.

    Args:
        norm: the BatchNorm whose parameters and running statistics it takes over.

    Guarantees:
        The output is that of `norm` in eval mode, bit for bit, whatever mode this module is in.
        Held by `test_frozen_is_eval_mode_bit_for_bit`.

    Raises:
        ConfigurationError: if `norm` has no running statistics.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> frozen = FrozenBatchNorm(norm).train()
        >>> x = torch.randn(5, 3)
        >>> torch.equal(frozen(x), norm.eval()(x))
        True
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise ConfigurationError(
                f"{type(norm).__name__} has no running statistics (track_running_stats=False), so "
                "there is nothing to freeze. Use batchnorm='group'."
            )
        self.num_features = norm.num_features
        self.eps = norm.eps
        self.register_parameter("weight", norm.weight if norm.affine else None)
        self.register_parameter("bias", norm.bias if norm.affine else None)
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [N, C, ...]."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


class GroupNormAct(nn.GroupNorm):
    """GroupNorm in the place of a BatchNorm that has a dropout and an activation built in (timm)."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [N, C, ...]."""
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


class FrozenBatchNormAct(FrozenBatchNorm):
    """`FrozenBatchNorm` with a dropout and an activation built in (timm)."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [N, C, ...]."""
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


def prepare(
    model: nn.Module,
    *,
    batchnorm: str = "auto",
    group_size: int = _GROUP_SIZE,
    num_groups: int | GroupsOf | None = None,
    fold: bool = True,
    report: Callable[[str], object] | None = print,
) -> nn.Module:
    """Convert, in place, the modules of `model` that mix examples; returns the model.

    BatchNorm of every kind, frozen and affine-free ones too, becomes GroupNorm or a
    `FrozenBatchNorm`; InstanceNorm stops tracking running statistics; the experts of a Switch
    Transformer all run (`AllExperts`). All else is left alone: `dptorch.check` finds what mixes
    examples in other ways.

    BatchNorm normalises a channel by its running mean and variance, GroupNorm by those of the
    channel's group within one example. Folding scales and moves GroupNorm's result by what would
    turn the one into the other if the example had the running statistics. Test accuracy in %, mean
    over seeds, of networks trained with BatchNorm on five classes: right after the conversion
    («kept»), after private fine-tuning on the five other classes (ε = 3), and of private training
    from random weights on those («scratch»)::

                                    residual CNN, MNIST, 12 epochs        MLP, digits, 20 epochs
                                    kept   fine-tuned   scratch           kept   fine-tuned   scratch
        frozen                      98.1   76.6         73.0              99.3   89.7         94.8
        groups of 16, copied        46.8   78.0         81.6              82.3   95.9         95.2
        groups of 16, folded        96.7   81.3         81.6              99.3   96.6         95.2

    (``python benchmarks/batchnorm.py --data mnist --seeds 2 --epochs 12`` and ``--data digits
    --seeds 4 --epochs 20``; the better of two learning rates; standard deviations at most 2.4, but
    16 of «copied, kept» on digits.) So folded GroupNorm is the default. Frozen is exact until
    something is trained, and was better after very few steps: 65.8 against 53.1 after 4 epochs of
    MNIST. These are small networks; with a large pretrained one, compare both.

    Running statistics, frozen or folded in, are functions of the data that the model was trained on
    before: that data must be public, or its privacy accounted for.

    Args:
        model: its modules are replaced. If it is itself a BatchNorm, use the return value.
        batchnorm: "group", GroupNorm; "frozen", the running statistics for good; "auto", GroupNorm
            except where all the parameters of a BatchNorm are frozen: it then goes with layers
            that no training will adapt to another normalisation.
        group_size: least number of channels that GroupNorm normalises together, where there are
            as many.
        num_groups: number of groups, instead of group_size; or a function that returns it for a
            BatchNorm.
        fold: adjust GroupNorm's scale and shift by the running statistics.
        report: called with a readable summary; None for silence. `preparation` gives the list.

    Guarantees:
        Afterwards no BatchNorm is left, in training and eval mode alike. Parameters are the same
        objects under the same names, so an optimizer made before still fits. A second call changes
        nothing. If it raises, the model is as it was.
        Held by `test_every_kind_stops_mixing`, `test_parameters_stay_the_same_objects` and
        `test_what_cannot_be_converted_is_named_and_nothing_is_changed`.

    Raises:
        ConfigurationError: for a BatchNorm that cannot be converted, naming it.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        >>> model = prepare(model)
        dptorch.prepare changed 1 module:
          BatchNorm2d -> GroupNorm (2 groups; statistics folded in): 1
        >>> model(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 32, 6, 6])
    """
    plan = list(_plan(model, batchnorm, _groups_of(group_size, num_groups), fold))
    replaced: dict[int, nn.Module] = {}
    for step in plan:
        new = step.convert()
        if new is not step.module:
            _take_over(step.module, new)
            replaced[id(step.module)] = new
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replaced:
                parent._modules[name] = replaced[id(child)]
    if report is not None:
        report(str(Preparation(tuple(step.change for step in plan))))
    return replaced.get(id(model), model)


def preparation(
    model: nn.Module,
    *,
    batchnorm: str = "auto",
    group_size: int = _GROUP_SIZE,
    num_groups: int | GroupsOf | None = None,
    fold: bool = True,
) -> Preparation:
    """What `prepare` would change with the same arguments; changes nothing.

    Example:
        >>> found = preparation(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
        >>> [(c.module, c.after) for c in found.changes]
        [('1', 'GroupNorm')]
    """
    steps = _plan(model, batchnorm, _groups_of(group_size, num_groups), fold)
    return Preparation(tuple(step.change for step in steps))


def groups_for(channels: int, group_size: int = _GROUP_SIZE) -> int:
    """The most groups of equal size that hold at least `group_size` channels each; at least one.

    Example:
        >>> groups_for(64), groups_for(24), groups_for(7), groups_for(96, 8)
        (4, 1, 1, 12)
    """
    most = max(1, channels // group_size)
    return max(g for g in range(1, most + 1) if channels % g == 0)


def _groups_of(group_size: int, num_groups: int | GroupsOf | None) -> GroupsOf:
    """The number of groups of each BatchNorm's replacement."""
    if group_size < 2:
        raise ConfigurationError(
            f"group_size={group_size} would normalise a channel by itself, which leaves nothing of "
            "a channel with one position. Use at least 2."
        )
    if num_groups is None:
        return lambda norm: groups_for(norm.num_features, group_size)
    return num_groups if callable(num_groups) else lambda _: num_groups


class _Step(NamedTuple):
    module: nn.Module
    change: Change
    convert: Callable[[], nn.Module]


def _plan(model: nn.Module, batchnorm: str, groups_of: GroupsOf, fold: bool) -> Iterator[_Step]:
    # Loaded where a model is looked at: `import dptorch` loads little.
    from dptorch.validation.all_experts import AllExperts, asks_who_is_hit

    one_of("batchnorm", batchnorm, BATCHNORM)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    uses = Counter(id(p) for m in norms for p in m.parameters(recurse=False))
    for name, module in model.named_modules():
        kind = type(module).__name__
        if asks_who_is_hit(module):
            yield _Step(module, Change(name, kind, "AllExperts", "every expert runs"), AllExperts)
        elif isinstance(module, _InstanceNorm):
            if module.track_running_stats or module.running_mean is not None:
                detail = "running statistics off, in eval mode too"
                yield _Step(module, Change(name, kind, kind, detail), partial(_untrack, module))
        elif isinstance(module, _BatchNorm):
            _refuse_unknown(name, module)
            after, detail = _choose(name, module, batchnorm)
            if after == "FrozenBatchNorm":
                step = partial(_frozen, module)
            else:
                groups = groups_of(module)
                if groups < 1 or module.num_features % groups:
                    raise ConfigurationError(
                        f"module '{name}' ({kind}): {module.num_features} channels cannot be cut into "
                        f"num_groups={groups} groups of equal size. Use a divisor of "
                        f"{module.num_features}."
                    )
                shared = any(uses[id(p)] > 1 for p in module.parameters(recurse=False))
                folds = fold and module.running_mean is not None and not shared
                step = partial(_group_norm, module, groups, fold=folds)
                plural = "s" if groups > 1 else ""
                how = "statistics folded in" if folds else "scale and shift kept"
                detail = f"{groups} group{plural}; {how}"
            yield _Step(module, Change(name, kind, after, detail), step)


def _choose(name: str, norm: _BatchNorm, batchnorm: str) -> tuple[str, str]:
    """Class name of the replacement, and why."""
    few = isinstance(norm, nn.BatchNorm1d) and norm.num_features < _FEW
    tracked = norm.running_mean is not None and norm.running_var is not None
    if (batchnorm == "frozen" or few) and not tracked:
        problem = (
            f"only {norm.num_features} channels, too few for GroupNorm"
            if few
            else "no running statistics to freeze"
        )
        raise ConfigurationError(
            f"module '{name}' ({type(norm).__name__}) has {problem} (track_running_stats=False"
            f"{', num_features=' + str(norm.num_features)}). Replace it by hand, or use "
            "batchnorm='group' for models without such modules."
        )
    kept = "running statistics fixed, scale and shift kept"
    if batchnorm == "frozen":
        return "FrozenBatchNorm", kept
    if few:
        return "FrozenBatchNorm", f"{kept}: {norm.num_features} channels are too few for GroupNorm"
    own = list(norm.parameters(recurse=False))
    if batchnorm == "auto" and tracked and own and not any(p.requires_grad for p in own):
        return "FrozenBatchNorm", f"{kept}: its parameters are frozen"
    return "GroupNorm", ""


def _refuse_unknown(name: str, norm: _BatchNorm) -> None:
    where = (
        f"module '{name}' ({type(norm).__name__})" if name else f"the model ({type(norm).__name__})"
    )
    if isinstance(norm, LazyModuleMixin) and norm.has_uninitialized_params():
        raise ConfigurationError(
            f"{where} does not know its number of channels yet. Run the model on one batch first."
        )
    if is_parametrized(norm):
        raise ConfigurationError(
            f"{where} has parametrized weights. Remove the parametrization first "
            "(torch.nn.utils.parametrize.remove_parametrizations)."
        )
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if type(norm).forward not in known and not _has_activation(norm):
        raise ConfigurationError(
            f"{where} is a BatchNorm with a forward of its own, which GroupNorm cannot stand in "
            "for. Replace it by hand with a module that treats examples independently."
        )


def _has_activation(norm: nn.Module) -> bool:
    """Whether this is timm's BatchNormAct2d, or one built like it."""
    names = {n for n, _ in norm.named_children()}
    return names == {"drop", "act"}


def _untrack(norm: _InstanceNorm) -> nn.Module:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return norm


def _frozen(norm: _BatchNorm) -> nn.Module:
    return FrozenBatchNormAct(norm) if _has_activation(norm) else FrozenBatchNorm(norm)


def _group_norm(norm: _BatchNorm, groups: int, *, fold: bool) -> nn.Module:
    kind = GroupNormAct if _has_activation(norm) else nn.GroupNorm
    new = kind(groups, norm.num_features, norm.eps, affine=False)
    new.weight, new.bias = norm.weight, norm.bias  # the objects themselves: optimizers hold them
    new.affine = norm.affine
    if fold:
        scale, shift = _folded(norm, groups)
        with torch.no_grad():
            if norm.affine:
                norm.bias.add_(norm.weight * shift)
                norm.weight.mul_(scale)
            else:
                new.weight = nn.Parameter(scale, requires_grad=False)
                new.bias = nn.Parameter(shift, requires_grad=False)
                new.affine = True
    return new


def _folded(norm: _BatchNorm, groups: int) -> tuple[Tensor, Tensor]:
    """(scale, shift), [C] each, with ``BatchNorm(x) = scale * GroupNorm(x) + shift`` for every x
    whose groups have the mean and variance that the running statistics imply."""
    mean_C, var_C = norm.running_mean, norm.running_var
    assert mean_C is not None
    assert var_C is not None
    mean_GC, var_GC = mean_C.view(groups, -1), var_C.view(groups, -1)
    mean_G1 = mean_GC.mean(1, keepdim=True)
    # The variance within channels and that between them.
    var_G1 = (var_GC + (mean_GC - mean_G1).square()).mean(1, keepdim=True)
    std_GC = (var_GC + norm.eps).sqrt()
    scale_GC = (var_G1 + norm.eps).sqrt() / std_GC
    shift_GC = (mean_G1 - mean_GC) / std_GC
    return scale_GC.flatten(), shift_GC.flatten()


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Mode, hooks and built-in submodules go over to the replacement."""
    new.training = old.training
    for name, child in old.named_children():
        new.add_module(name, child)
    for attribute in _HOOKS:  # the same dictionaries: handles kept elsewhere can still remove
        new.__dict__[attribute] = old.__dict__[attribute]
