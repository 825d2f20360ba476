"""Accuracy against the size of a model at one ε, on short texts: the figure of docs/tasks.md.

    python -m benchmarks.model_size

The models are the first 0 to 6 layers of MiniLM, which is frozen and public; a linear layer on means of
their hidden states is trained, by the settings of the recipe `reviews` of `dptorch train
text-classification`, at ε = 3 and without privacy. The states of all layers come from one pass over the
texts, and are kept in the cache folder. The texts are the tweets and the snippets about products that
lie beside the movie reviews. The recipe's rate was chosen on another split of the same texts, for all
six layers; nothing was chosen by these runs.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dptorch import PrivacyEngine
from dptorch.plan import make_plan
from dptorch.text.batches import Padded
from dptorch.text.classification import tokenize_rows
from dptorch.text.models import load_pretrained
from dptorch.text.recipes import MINILM
from dptorch.training.packages import cache_folder
from dptorch.training.reviews import snippets
from dptorch.training.schedules import Schedule

EPSILON, DELTA, RUNS = 3.0, 1e-5, 3
BATCH, EPOCHS, RATE, LENGTH = 600, 2.7, 1.5e-2, 48
TEST: Final = 1200
_AT_ONCE: Final = 64


def states() -> tuple[Tensor, Tensor, list[int]]:
    """Return mean states [N, 7, D] of all texts, labels [N], and parameters up to each layer."""
    model, tokenizer = load_pretrained(MINILM, "body")
    model.eval()
    first = sum(p.numel() for p in model.embeddings.parameters())
    layer = sum(p.numel() for p in model.encoder.layer[0].parameters())
    sizes = [first + k * layer for k in range(1 + len(model.encoder.layer))]
    parts = [snippets("amazon"), snippets("tweets")]
    texts, labels = [t for part, _ in parts for t in part], torch.cat([y for _, y in parts])
    kept = cache_folder() / "model-size-states.npy"
    if kept.exists():
        return torch.from_numpy(np.load(kept, allow_pickle=False)), labels, sizes
    rows = tokenize_rows([(t,) for t in texts], labels.tolist(), tokenizer, LENGTH)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    collate = Padded({"input_ids": tokenizer.pad_token_id})
    found = torch.empty(len(rows), len(sizes), model.config.hidden_size)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(order), _AT_ONCE):
            some = order[start : start + _AT_ONCE]
            batch: dict[str, Any] = collate([rows[i] for i in some])
            del batch["labels"]
            hidden = model(**batch, output_hidden_states=True).hidden_states
            mask_BT1 = batch["attention_mask"][:, :, None]
            means = [(h.float() * mask_BT1).sum(1) / mask_BT1.sum(1) for h in hidden]
            found[some] = torch.stack(means, 1)
    np.save(kept, found.numpy())
    return found, labels, sizes


def accuracy(features: Tensor, labels: Tensor, *, private: bool) -> float:
    """Train a linear layer on most of the texts; return its accuracy on the others."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    test, train = order[:TEST], order[TEST:]
    data = TensorDataset(features[train], labels[train])
    plan = make_plan(
        sample_rate=BATCH / len(data), sample_size=len(data), epochs=EPOCHS, target_epsilon=EPSILON,
        target_delta=DELTA, max_grad_norm=1.0,
    )  # fmt: skip
    model = nn.Linear(features.shape[1], 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    mode = "auto" if private else "non-private"
    engine = PrivacyEngine(model, plan=plan, clipping_mode=mode)
    optimizer = engine.attach(torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0))
    schedule = Schedule("linear", plan.steps)
    loader = engine.loader(data)
    while engine.steps_done < plan.steps:
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            schedule.apply(optimizer, engine.steps_done)
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        right = model(features[test]).argmax(1) == labels[test]
    return float(right.float().mean())


def main() -> None:
    """Print a row for each size."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    found, labels, sizes = states()
    print(
        f"| layers | parameters | ε = {EPSILON:g} | mean | without privacy |\n|---|---|---|---|---|"
    )
    for last, size in enumerate(sizes):
        means = found[:, [round(2 * last / 3), last]].flatten(1)
        features = F.layer_norm(means, means.shape[1:])
        runs = [accuracy(features, labels, private=True) for _ in range(RUNS)]
        free = accuracy(features, labels, private=False)
        each, mean = ", ".join(f"{run:.3f}" for run in runs), statistics.mean(runs)
        print(
            f"| {last} | {size / 1e6:.1f} million | {each} | {mean:.3f} | {free:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
