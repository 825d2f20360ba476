"""Loops that look at their training: logs, metrics, asserts, evaluation between steps."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.engine.legitimate.harness import Program, Run, plain_loop
from tests.engine.legitimate.loops import loss_of, public

__all__ = ["MONITORED"]

MONITORED: dict[str, Program] = {}


def loop(function: Callable[[Run], Any]) -> Callable[[Run], Any]:
    """Add a loop to the table, under its name in words."""
    MONITORED[function.__name__.replace("_", " ")] = Program(loss_of, loop=function)
    return function


def stepping(body: Callable[[Run, Tensor, Tensor, Tensor], Any]) -> None:
    """Add a loop: `body` gets run, x, y and the loss after the backward, before the step."""

    def whole(run: Run) -> None:
        for x, y in run.batches():
            run.optimizer.zero_grad()
            out = run.model(x)
            loss = F.cross_entropy(out, y)
            loss.backward()
            body(run, out, y, loss)
            run.optimizer.step()

    whole.__name__ = body.__name__
    loop(whole)


# -- logging ---------------------------------------------------------------------------------------


@stepping
def items_of_the_loss(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    history: list[float] = []
    history.append(loss.item())
    assert isinstance(sum(history) / len(history), float)


@loop
def running_sum_of_items(run: Run) -> None:
    total, seen = 0.0, 0
    for x, y in run.batches():
        loss = run.loss(run.model, (x, y))
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        total += loss.item() * x.size(0)
        seen += len(x)
    assert total / seen > 0


@loop
def running_sum_of_detached_losses(run: Run) -> None:
    total = torch.zeros(())
    for batch in run.batches():
        loss = run.loss(run.model, batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        total += loss.detach()
    assert total.item() > 0


@loop
def running_sum_starting_at_zero(run: Run) -> None:
    total: Any = 0
    for batch in run.batches():
        loss = run.loss(run.model, batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        total = total + loss.detach() * len(batch[0])
    assert float(total) > 0


@loop
def losses_stacked_at_the_end(run: Run) -> None:
    losses = []
    for batch in run.batches():
        loss = run.loss(run.model, batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(loss.detach())
    assert torch.stack(losses).mean() > 0


@loop
def smoothed_loss(run: Run) -> None:
    smooth = None
    for batch in run.batches():
        loss = run.loss(run.model, batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.9 * smooth + 0.1 * loss.item()
        assert f"{smooth:.3f}" != ""


@loop
def metrics_at_the_end(run: Run) -> None:
    outs, targets = [], []
    for x, y in run.batches():
        out = run.model(x)
        F.cross_entropy(out, y).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        outs.append(out.detach().cpu())
        targets.append(y.cpu())
    scores, labels = torch.cat(outs), torch.cat(targets)
    assert (scores.argmax(1) == labels).float().mean() >= 0


@stepping
def accuracy(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    assert 0 <= (out.argmax(1) == y).float().mean().item() <= 1
    assert (out.argmax(dim=-1).eq(y)).sum().item() <= len(y)


@stepping
def accuracy_without_gradients(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    with torch.no_grad():
        right = (torch.max(out, 1)[1] == y).sum()
        assert int(right) <= y.numel()


@stepping
def top_k(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    _, found = out.topk(2, 1)
    right = found.t().eq(y.view(1, -1).expand(2, -1))
    assert right[:2].reshape(-1).float().sum(0, keepdim=True).mul_(100.0 / len(y)).item() >= 0


@stepping
def metrics_in_numpy(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    scores, labels = out.detach().cpu().numpy(), y.cpu().numpy()
    assert np.mean(scores.argmax(1) == labels) <= 1
    assert np.corrcoef(scores[:, 0], labels).shape == (2, 2)


@stepping
def confusion_matrix(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    matrix = torch.zeros(3, 3, dtype=torch.long)
    for t, p in zip(y.view(-1), out.argmax(1).view(-1), strict=True):
        matrix[t.long(), p.long()] += 1
    counts = torch.bincount(3 * y + out.argmax(1), minlength=9).reshape(3, 3)
    assert torch.equal(matrix, counts)


@stepping
def counted_labels(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    assert sum(Counter(y.tolist()).values()) == len(y)
    by_class: dict[int, list[float]] = defaultdict(list)
    for each, label in zip(out.detach(), y, strict=True):
        by_class[int(label)].append(each.max().item())


@stepping
def progress_bar(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    postfix = {"loss": f"{loss.item():.4f}", "lr": run.optimizer.param_groups[0]["lr"]}
    texts = [str(postfix), f"{loss:.3f}", f"{loss.item():.3f}", str(loss), repr(out)]
    assert all(texts)


@stepping
def window_of_losses(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    window: deque[float] = deque(maxlen=10)
    window.append(float(loss))
    assert np.mean(window) == float(loss.detach())


@stepping
def histogram_of_outputs(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    assert torch.histc(out.detach(), bins=4).sum() == out.numel()
    assert out.detach().std().item() > 0


@stepping
def norms_of_parameters(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    assert sum(float(p.detach().norm()) for p in run.model.parameters()) > 0
    assert sum(p.numel() for p in run.model.parameters() if p.requires_grad) > 0


@stepping
def per_task_logs(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    logs = {"loss": loss, "entropy": -(out.softmax(1) * out.log_softmax(1)).sum(1).mean()}
    values = {k: v.item() for k, v in logs.items()}
    assert all(isinstance(v, float) for v in values.values())


@stepping
def worst_example_logged(run: Run, out: Tensor, y: Tensor, loss: Tensor) -> None:
    each = F.cross_entropy(out.detach(), y, reduction="none")
    assert each.max().item() >= each.min().item()
    assert y[each.argmax()].item() in (0, 1, 2)


# -- asserts and guards ----------------------------------------------------------------------------


@loop
def asserts_on_the_batch(run: Run) -> None:
    for x, y in run.batches():
        assert torch.isfinite(x).all()
        assert not torch.isnan(x).any()
        assert x.shape[0] == y.shape[0]
        assert x.dtype == torch.float32
        assert y.min() >= 0
        assert y.max() < 3
        loss = run.loss(run.model, (x, y))
        if not torch.isfinite(loss):
            raise RuntimeError("the loss is not finite")
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


@loop
def guard_by_math(run: Run) -> None:
    for batch in run.batches():
        loss = run.loss(run.model, batch)
        if not math.isfinite(loss.item()):
            raise RuntimeError("the loss is not finite")
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


# -- evaluation ------------------------------------------------------------------------------------


@loop
def evaluation_between_steps(run: Run) -> None:
    x, y = public()
    for batch in run.batches():
        run.model.train()
        run.loss(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.model.eval()
        with torch.no_grad():
            assert (run.model(x).argmax(1) == y).float().mean().item() <= 1
        run.model.train()


@loop
def evaluation_in_inference_mode(run: Run) -> None:
    x, y = public()
    for batch in run.batches():
        run.loss(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.model.eval()
        with torch.inference_mode():
            assert F.cross_entropy(run.model(x), y).item() > 0
        run.model.train()


@loop
def evaluation_over_a_loader(run: Run) -> None:
    held_out = DataLoader(TensorDataset(*public()), batch_size=3)
    for batch in run.batches():
        run.loss(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.model.eval()
        right = 0
        with torch.no_grad():
            for x, y in held_out:
                right += (run.model(x).argmax(1) == y).sum().item()
        run.model.train()
        assert right <= 8


@loop
def early_stopping_on_public_data(run: Run) -> None:
    x, y = public()
    best, bad = math.inf, 0
    for batch in run.batches():
        run.loss(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        with torch.no_grad():
            value = F.cross_entropy(run.model(x), y).item()
        bad = 0 if value < best else bad + 1
        best = min(best, value)
        if bad > 100:
            break


@loop
def evaluation_of_the_training_batch(run: Run) -> None:
    for x, y in run.batches():
        with torch.no_grad():
            before = run.model(x).argmax(1)
        run.loss(run.model, (x, y)).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert (before == y).float().mean() <= 1


@loop
def pretraining_on_public_data(run: Run) -> None:
    x, y = public()
    plain = torch.optim.SGD(run.model.parameters(), 0.01)
    with run.engine.public():
        F.cross_entropy(run.model(x), y).backward()
        plain.step()
        plain.zero_grad()
    plain_loop(run)


@loop
def public_step_between(run: Run) -> None:
    x, y = public()
    plain = torch.optim.SGD(run.model.parameters(), 0.01)
    for batch in run.batches():
        run.loss(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        with run.engine.public():
            F.cross_entropy(run.model(x), y).backward()
            plain.step()
            plain.zero_grad()
