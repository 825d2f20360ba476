"""The recipe `cifar10-wrn-16-4` learns 65 pictures by heart: its own network, at CIFAR-10's own size.

    python -m benchmarks.overfit    # part of `make zoo`; exits with 1 unless 64 of them are right

The pictures are in files of CIFAR-10's format. Views, learning rate and average are those of a short
run: one view a picture, next to no noise. The tests do the same with a small network.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from tests.vision.files import write_cifar10

from dptorch.vision.job import VisionJob, prepare

RECIPE: Final = "cifar10-wrn-16-4"
PICTURES: Final = 65  # five files of 13
ENOUGH: Final = 64
SETTINGS: Final[dict[str, Any]] = {
    "epochs": 26, "views": 1, "augment": "none", "learning_rate": 1.0, "ema": 0.6,
}  # fmt: skip


def overfit(folder: Path, *, say: bool = False, **settings: Any) -> float:
    """Train the recipe with these settings on pictures that are written to a folder, all in each step.

    Returns:
        the share of them that the average of its weights gets right.
    """
    write_cifar10(folder, train=PICTURES, test=10)
    job = VisionJob(
        recipe=RECIPE, data=str(folder), batch_size=PICTURES, noise_multiplier=0.01, seed=0,
        scale="half", **settings,
    )  # fmt: skip
    setup = prepare(job)
    while not setup.engine.exhausted:
        began = time.process_time()
        for batch in setup.engine.loader(setup.data.train):
            loss = setup.task.loss(setup.model, batch, setup.device)[0]
            loss.backward()
            setup.optimizer.step()
            setup.optimizer.zero_grad()
            if say:
                seconds = time.process_time() - began
                print(
                    f"step {setup.engine.steps_done}: loss {float(loss.detach()):.3f}, {seconds:.1f} s"
                )
    with setup.with_result():
        tested = setup.task.evaluate(setup.model, setup.data.train, setup.device)
    return float(tested["test_accuracy"])


def main() -> int:
    """Run the command."""
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        right = round(PICTURES * overfit(Path(folder), say=True, **SETTINGS))
    seconds = time.process_time() - began
    print(f"{RECIPE}: {right} of {PICTURES} pictures right, {seconds:.0f} s of processor time")
    return 0 if right >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
