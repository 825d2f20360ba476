"""The white-box game on the engine itself, with Dirac canaries (Nasr et al. 2023, arXiv:2302.07956).

Each canary is a training record whose gradient lies along one coordinate, which no other record
touches, and is far larger than the clipping norm. The adversary sees every noisy gradient. Sampler,
forward pass, per-example gradients, clipping, noise and division are the engine's own.

Because coordinates do not interfere, one run plays as many independent games as there are canaries:
coordinate i of step t is N(b, σ²) in units of the clipping norm, b = 1 if canary i was in that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dptorch.accounting import Adjacency
from dptorch.accounting.toeplitz import column_norms
from dptorch.audit.evidence import Array, Evidence
from dptorch.audit.laws.sampling import Drawn
from dptorch.audit.result import FEWEST_CANARIES
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError
from dptorch.plan import PrivacyPlan

__all__ = ["DiracGame", "TiedTable", "play_dirac"]

# How much larger than the clipping norm a canary's gradient is.
_EXCESS = 100.0
Progress = Callable[[Iterable[int], int], Iterable[int]]


class TiedTable(nn.Module):
    """A table of one number for each canary, used twice as tied embeddings are: looked up, and as the
    weights of the output layer.

    The output for a record (id, a, b) is ``sign * (a * table[id] + b * table[id])``, so its gradient
    is ``sign * (a + b)`` at one coordinate.

    Attributes:
        sign: +1 or -1, set by the game before each step; public.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(size, 1))
        self.sign = 1.0

    def forward(self, ids: Tensor, scales: Tensor) -> Tensor:
        """ids int64 [B], scales [B, 2] -> [B]."""
        looked_up = F.embedding(ids, self.table)[:, 0]
        logits = F.linear(torch.ones_like(scales[:, :1]), self.table)
        put_out = logits.gather(1, ids[:, None])[:, 0]
        return self.sign * (scales[:, 0] * looked_up + scales[:, 1] * put_out)


@dataclass(frozen=True, eq=False)
class DiracGame:
    """What the adversary saw, in units of the clipping norm.

    Attributes:
        steps: evidence of single steps: one score for each canary and step; a member took part in
            that step, as far as the sampler says.
        run: evidence of the whole run: one score for each canary; a member was in the data.
        noise: [steps, canaries]: what is left of each coordinate without what its canary did, white
            again where noise is correlated: N(0, σ²) if the engine does what the plan says.
        drawn: whom the sampler drew.
    """

    steps: Evidence
    run: Evidence
    noise: Array
    drawn: Drawn


def play_dirac(
    plan: PrivacyPlan,
    *,
    canaries: int = 1000,
    steps: int | None = None,
    seed: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    member: Array | None = None,
) -> DiracGame:
    """Run the engine on canaries alone, under a plan.

    The sign of all canaries' gradients alternates from step to step, and so does the adversary's
    sum over steps: what the noise of two steps has in common then cancels.

    Args:
        plan: what is audited.
        canaries: each in the data by a fair coin.
        steps: how many of the plan's steps to play; by default all.
        seed: for tests: the engine's and the coins' randomness from a number.
        device: where the engine runs.
        progress: wraps the iterable of steps, of which it is told the number, to show a bar.
        member: coins of an earlier game with as many canaries, to play on the same data again.

    Raises:
        ConfigurationError: fewer than 20 canaries, or more steps than the plan has.

    Example:
        >>> from dptorch import make_plan
        >>> plan = make_plan(sample_rate=1.0, sample_size=100, steps=4, noise_multiplier=2.0)
        >>> game = play_dirac(plan, canaries=200, seed=0)
        >>> len(game.steps), len(game.run)
        (800, 200)
    """
    _refuse_few(canaries)
    wanted = plan.steps if steps is None else steps
    if not 1 <= wanted <= plan.steps:
        raise ConfigurationError(f"steps={steps!r}: the plan has {plan.steps} steps.")
    slots = canaries + canaries // 2
    if plan.sampling in ("poisson", "cyclic-poisson"):
        # The rate is what is audited; how many records it is applied to is the game's affair.
        plan = replace(plan, sample_size=None)
    elif plan.sample_size is not None:
        slots, canaries = plan.sample_size, min(canaries, 2 * plan.sample_size // 3)
    _refuse_few(canaries)
    if member is None:
        member = np.random.default_rng(seed).random(canaries) < 0.5
    model = TiedTable(canaries).to(device)
    engine = PrivacyEngine(model, plan=plan, seed=seed)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    rows = plan.max_examples_per_user or 1
    loader = engine.loader(
        _records(member, slots, rows, plan),
        user_ids=np.arange(slots).repeat(rows).tolist() if plan.unit == "user" else None,
        max_physical_batch_size=4096,
    )
    signal = np.zeros(canaries)
    scores = np.empty((wanted, canaries))
    drawn = np.zeros((wanted, canaries), dtype=bool)
    batches: list[Array] = []
    scale = plan.max_grad_norm
    if plan.loss_reduction == "mean":
        scale /= plan.expected_batch_size

    def steps_taken() -> Iterable[int]:
        while engine.steps_done < wanted:
            for ids, scales in loader:
                step = engine.steps_done
                if step == wanted:
                    break
                model.sign = -1.0 if step % 2 else 1.0
                out = model(ids.to(device), scales.to(device))
                loss = out.mean() if plan.loss_reduction == "mean" else out.sum()
                loss.backward()
                optimizer.step()
                if engine.steps_done > step:
                    yield step
                optimizer.zero_grad()

    taken: Iterable[int] = steps_taken()
    for step in taken if progress is None else progress(taken, wanted):
        assert model.table.grad is not None
        seen = model.table.grad[:, 0].double().cpu().numpy() / scale * model.sign
        scores[step] = seen
        signal += seen
        chosen = np.unique(np.asarray(loader.sampler.draw(step)) // rows)
        drawn[step, chosen[chosen < canaries]] = True
        batches.append(chosen)
    engine.detach()
    noise = _noise(scores, drawn, member, plan)
    counted = np.ones_like(drawn)
    if len(plan.coefficients) > 1:
        whiten = _whitened if plan.mechanism == "banded" else _whitened_inverse
        scores, counted = whiten(scores, drawn, plan)
        signal = np.where(counted, scores, 0.0).sum(axis=0)
    if plan.adjacency is Adjacency.REPLACE_ONE:
        # Every slot that was drawn shows one of the two records.
        shown = drawn & counted
        single = Evidence(scores[shown], np.broadcast_to(member, drawn.shape)[shown])
    else:
        single = Evidence(scores[counted], (drawn & member)[counted])
    return DiracGame(
        steps=single,
        run=Evidence(signal / wanted, member),
        noise=noise,
        drawn=Drawn.of(batches, slots, plan.terms.steps_per_epoch),
    )


def _noise(scores: Array, drawn: Array, member: Array, plan: PrivacyPlan) -> Array:
    """What was added to each step's coordinates, [steps, canaries]; of correlated noise its white z.

    Args:
        scores, drawn: as of `_whitened`.
    """
    out = -1.0 if plan.adjacency is Adjacency.REPLACE_ONE else 0.0
    steps = len(scores)
    signs = np.where(np.arange(steps) % 2, -1.0, 1.0)[:, None]
    added = signs * (scores - drawn * np.where(member, 1.0, out))
    if len(plan.coefficients) < 2:
        return added
    if plan.mechanism == "banded":
        added = added / column_norms(plan.coefficients, plan.steps)[:steps, None]
        strategy = np.asarray(plan.coefficients) / plan.coefficients[0]
    else:
        run: Any = plan.event(steps)
        strategy = run.strategy(steps)
    return _filtered(added, strategy)


def _filtered(rows: Array, column: Array) -> Array:
    """The product of the Toeplitz matrix with that first column and the rows, [steps, canaries]."""
    found = np.zeros_like(rows)
    for i, value in enumerate(column[: len(rows)]):
        found[i:] += value * rows[: len(rows) - i]
    return found


def _whitened(scores: Array, drawn: Array, plan: PrivacyPlan) -> tuple[Array, Array]:
    """What steps show of each canary where noise is correlated, and which of it is independent.

    All of a run is Cx + z for white z. What it shows of a participation in step t is the product with
    column t of C, of norm 1: it is N(b, σ²) again, from the rows of the next steps too. The turns of a
    group share no rows.

    Args:
        scores: [steps, canaries], of single steps; drawn: whether the canary was in the batch.

    Returns:
        scores of the same shape, and whether the step is a turn of the canary's group, which may be any
        for a canary that was never drawn.
    """
    steps, bands = len(scores), len(plan.coefficients)
    signs = np.where(np.arange(steps) % 2, -1.0, 1.0)[:, None]
    columns = column_norms(plan.coefficients, plan.steps)[:steps, None]
    c = np.asarray(plan.coefficients) / plan.coefficients[0]
    rows = _filtered(signs * scores / columns, c)
    found = np.zeros_like(scores)
    for i, value in enumerate(c[:steps]):
        found[: steps - i] += value * rows[i:]
    group = np.where(drawn.any(axis=0), drawn.argmax(axis=0), np.arange(drawn.shape[1])) % bands
    turns = np.arange(steps)[:, None] % bands == group
    if steps < plan.steps:
        turns[max(0, steps - bands + 1) :] = False  # their columns go on past what was seen
    return signs * found / columns, turns


def _whitened_inverse(scores: Array, drawn: Array, plan: PrivacyPlan) -> tuple[Array, Array]:
    """The same where nothing is sampled: row t of Cx + z, in the first step of each canary's.

    There it is N(b, σ²): what the canary did in earlier steps is nothing.
    """
    steps = len(scores)
    run: Any = plan.event(steps)
    signs = np.where(np.arange(steps) % 2, -1.0, 1.0)[:, None]
    rows = _filtered(signs * scores, run.strategy(steps))
    first = np.where(drawn.any(axis=0), drawn.argmax(axis=0), np.arange(drawn.shape[1]) % steps)
    return signs * rows, np.arange(steps)[:, None] == first


def _records(member: Array, slots: int, rows: int, plan: PrivacyPlan) -> TensorDataset:
    """`rows` records for each slot: first those of the canaries, then ordinary ones without any
    gradient.

    The slot of a canary that is out holds records that contribute nothing or, under replace-one, the
    opposite gradient.
    """
    canaries = len(member)
    out = -1.0 if plan.adjacency is Adjacency.REPLACE_ONE else 0.0
    size = torch.zeros(slots)
    size[:canaries] = torch.where(torch.from_numpy(member), 1.0, out) * _EXCESS * plan.max_grad_norm
    ids = torch.arange(slots) % canaries
    return TensorDataset(
        ids.repeat_interleave(rows), size.repeat_interleave(rows)[:, None].expand(-1, 2) / 2
    )


def _refuse_few(canaries: int) -> None:
    if canaries < FEWEST_CANARIES:
        raise ConfigurationError(
            f"canaries={canaries}: use at least {FEWEST_CANARIES}, in a plan with half as many "
            "records again."
        )
