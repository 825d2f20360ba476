"""Every image model by name against a loop over single examples; writes ``docs/zoo.md``.

    python -m benchmarks.zoo                 # all of them, about an hour on two cores
    python -m benchmarks.zoo vit_tiny swin   # only names that begin so; other rows are kept
    python -m benchmarks.zoo --command       # each name of timm: a step of the command, 25 minutes

Each model runs at its published width and depth on two small images, every trainable parameter
trained, BatchNorm replaced by GroupNorm by hand. Results are kept in ``docs/zoo.jsonl`` as they
come, so that an interrupted run can be taken up again with ``--resume``. ``--command`` writes nothing:
it goes from files of CIFAR-10's format to a run folder, as a user does, and says which names fail.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tests.oracles.torchvision_on_cpu  # noqa: F401
import torch
import torch.nn.functional as F
from tests.oracles.loop import relative_error
from tests.tape.zoo.vision import group_norm, steady
from tests.vision.files import write_cifar10
from torch import Tensor, nn

from dptorch.compat.private_vision.__main__ import main as train_cifar
from dptorch.tape import Recording
from dptorch.tape.gradients.parameter_guard import ParameterGuard
from dptorch.tape.recording.patches import patched

ROOT = Path(__file__).parents[1]
ROWS, TABLE = ROOT / "docs" / "zoo.jsonl", ROOT / "docs" / "zoo.md"
TIMM = (Path(__file__).parent / "timm_models.txt").read_text().split()
TORCHVISION = """densenet121 densenet161 densenet201 vgg11 vgg16_bn resnet18 resnet50 efficientnet_b0
    efficientnet_v2_s convnext_tiny swin_t swin_v2_t maxvit_t"""
# Four times as many numbers of 8 bytes must fit in memory; larger models run in float32.
LARGEST_IN_FLOAT64 = 400_000_000

# Image sizes: as small as the architecture allows.
_FIXED = {"crossvit": 240, "inception": 96, "xception": 96, "hrnet": 64, "maxvit": 224}
_RESIZED = ("vit", "deit", "beit", "mixer", "cait", "xcit", "convit", "pit", "jx_nest", "visformer",
            "volo", "twins", "swin")  # fmt: skip


def side_of(name: str) -> int:
    """The side of a model's images."""
    return next((side for prefix, side in _FIXED.items() if name.startswith(prefix)), 64)


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """The model and the side of its images."""
    torch.manual_seed(0)
    size = side_of(name)
    if library == "torchvision":
        import torchvision.models

        return getattr(torchvision.models, name)(num_classes=10), size
    import timm

    settings: dict[str, Any] = {"img_size": size} if name.startswith(_RESIZED) else {}
    return timm.create_model(name, num_classes=10, **settings), size


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def looped(
    model: nn.Module, x: Tensor, y: Tensor, coefficients: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Norms and the weighted sum, one example at a time; nothing is kept but the sum."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total: dict[str, Tensor] = {}
    norms = []
    for i in range(len(x)):
        grads = torch.autograd.grad(
            loss_of(model, x[i : i + 1], y[i : i + 1]).sum(),
            list(parameters.values()),
            allow_unused=True,
        )
        squared = torch.zeros(())
        for (name, p), g in zip(parameters.items(), grads, strict=True):
            if g is None:
                continue
            squared = squared + g.square().sum()
            total.setdefault(name, torch.zeros_like(p)).add_(g, alpha=float(coefficients[i]))
        norms.append(squared.sqrt())
    return torch.stack(norms), total


def run(library: str, name: str) -> dict[str, Any]:
    """One row of the table."""
    torch.set_default_dtype(torch.float32)
    model, size = build(library, name)
    count = sum(p.numel() for p in model.parameters())
    dtype = torch.float64 if count <= LARGEST_IN_FLOAT64 else torch.float32
    torch.set_default_dtype(dtype)
    model = steady(group_norm(model)).to(dtype)
    x, y = torch.randn(2, 3, size, size), torch.tensor([1, 7])
    coefficients = torch.tensor([0.7, 0.2])
    started = time.perf_counter()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    recording = Recording(model, guard=ParameterGuard(parameters, strict=False))
    x_tagged = recording.tag_batch(x)
    with patched(), recording:
        loss = loss_of(model, x_tagged, y).sum()
    loss.backward()
    norms = recording.tape.norms()
    clipped = recording.tape.clipped_sum(coefficients)
    seconds = time.perf_counter() - started
    recording.tape.close()
    expected, total = looped(model, x, y, coefficients)
    # Parameter by parameter: one with a small gradient must not hide behind the others.
    errors = [relative_error(clipped[n].to(t.dtype), t) for n, t in total.items()]
    return {
        "model": name,
        "library": library,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "image": size,
        "dtype": str(dtype).removeprefix("torch."),
        "sites": recording.sites,
        "generic": sorted({op for op, _ in recording.generic_ops}),
        "norm_error": relative_error(norms, expected),
        "sum_error": max(errors),
        "seconds": round(seconds, 2),
    }


def step_by_command(name: str) -> str:
    """Train a model of timm by private_vision's command, one step on five pictures: what became of it.

    Raises:
        RuntimeError: the command failed, with what it said.
    """
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch:
        data, runs = Path(scratch, "data"), Path(scratch, "runs")
        write_cifar10(data, train=5, test=2)
        words = (
            f"--model {name} --pretrained 0 --image_size {side_of(name)} --bs 5 --mini_bs 2 --seed 0 "
            f"--data {data} --runs {runs} --name one --no-ledger --no-diagnostics"
        )
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                train_cifar(words.split())
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(said.getvalue().strip()) from None
        about = json.loads((runs / "one" / "run.json").read_text())
    result, parameters = about["result"], about["model"]["trainable_parameters"]
    return f"{parameters:,} parameters, step {result['step']}, epsilon {result['epsilon']:.3f}"


def rows() -> Iterator[dict[str, Any]]:
    if ROWS.exists():
        for line in ROWS.read_text().splitlines():
            yield json.loads(line)


def write_table() -> None:
    known = {(r["library"], r["model"]): r for r in rows()}
    order = [("timm", n) for n in TIMM] + [("torchvision", n) for n in TORCHVISION.split()]
    done = [known[key] for key in order if key in known]
    failed = [r for r in done if "error" in r]
    lines = [
        "# Image models, exactly",
        "",
        "Every row: the published architecture, unmodified but for BatchNorm, which is replaced by "
        "GroupNorm; two images; every parameter trained. Errors are relative, against a loop over "
        "single examples, of the per-example norms and of the clipped sum (the worst parameter). "
        "*Generic* names the ops whose gradients go through the rule that any op has, at the cost of "
        "one backward an example. "
        "Seconds are those of one forward, backward, norms and clipped sum on one CPU core.",
        "",
        f"{len(done)} of {len(order)} models, {len(failed)} failed. Made by `make zoo`.",
        "",
        "| model | library | parameters | image | dtype | sites | generic | norms | clipped sum | s |",
        "|---|---|--:|--:|---|--:|---|--:|--:|--:|",
    ]
    for r in done:
        if "error" in r:
            lines.append(
                f"| {r['model']} | {r['library']} | | | | | | **failed** | {r['error']} | |"
            )
            continue
        lines.append(
            f"| {r['model']} | {r['library']} | {r['parameters'] / 1e6:.1f} M | {r['image']} | "
            f"{r['dtype']} | {r['sites']} | {', '.join(r['generic']) or 'none'} | "
            f"{r['norm_error']:.0e} | {r['sum_error']:.0e} | {r['seconds']:.1f} |"
        )
    TABLE.write_text("\n".join(lines) + "\n")


def all_by_command(prefixes: tuple[str, ...]) -> int:
    """Say of each name whether its step was taken; 1 if one was not."""
    failed = []
    for name in TIMM:
        if prefixes and not name.startswith(prefixes):
            continue
        try:
            print(f"{name}: {step_by_command(name)}", flush=True)
        except Exception as problem:  # the others are tried too
            failed.append(name)
            print(f"{name}: FAILED, {problem}", flush=True)
        gc.collect()
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "none failed")
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    resume = "--resume" in arguments
    prefixes = tuple(a for a in arguments if not a.startswith("-"))
    torch.set_num_threads(1)
    if "--command" in arguments:
        return all_by_command(prefixes)
    order = [("timm", n) for n in TIMM] + [("torchvision", n) for n in TORCHVISION.split()]
    chosen = [key for key in order if not prefixes or key[1].startswith(prefixes)]
    known = {(r["library"], r["model"]): r for r in rows()}
    for library, name in chosen:
        if resume and "error" not in known.get((library, name), {"error": ""}):
            continue
        print(f"{library} {name} ...", flush=True)
        row: dict[str, Any]
        try:
            row = run(library, name)
        except Exception as problem:  # a row that fails says why
            traceback.print_exc()
            row = {"model": name, "library": library, "error": str(problem)[:200]}
        print(row, flush=True)
        known[library, name] = row
        ROWS.write_text("".join(json.dumps(r) + "\n" for r in known.values()))
        write_table()
        gc.collect()
    bad = [r for r in known.values() if "error" in r or not tolerable(r)]
    return 1 if bad else 0


def tolerable(row: dict[str, Any]) -> bool:
    """Whether a row meets what is promised: 1e-9 in float64, 1e-4 in float32."""
    limit = 1e-9 if row["dtype"] == "float64" else 1e-4
    return max(row["norm_error"], row["sum_error"]) <= limit


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
