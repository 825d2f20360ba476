"""A GAN on handwritten digits whose discriminator alone sees them, and is trained privately.

The generator learns through the discriminator, so what it makes is as private as that is: it may be
released, with as many images as you like.

Run: python examples/gan.py    (pip install 'dptorch[report]', for scikit-learn's digits)
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dptorch import PrivacyEngine

NOISE, PIXELS, MADE = 16, 64, 64


def train(epochs: int = 40, size: int = 1437, batch_size: int = 64) -> tuple[nn.Module, float]:
    """Return (the generator, the epsilon that it may be released under)."""
    digits = torch.tensor(load_digits().data[:size], dtype=torch.float32) / 8 - 1
    discriminator = nn.Sequential(nn.Linear(PIXELS, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    generator = nn.Sequential(nn.Linear(NOISE, 64), nn.ReLU(), nn.Linear(64, PIXELS), nn.Tanh())
    engine = PrivacyEngine(
        discriminator,
        sample_size=size,
        batch_size=batch_size,
        epochs=epochs,
        target_epsilon=8.0,
        target_delta=1e-4,
    )
    d_optimizer = engine.attach(torch.optim.Adam(discriminator.parameters(), lr=1e-3))
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)

    def scored(images: Tensor, real: bool) -> Tensor:
        scores = discriminator(images)[:, 0]
        return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))

    loader = engine.loader(TensorDataset(digits))
    while not engine.exhausted:
        for (real,) in loader:
            d_optimizer.zero_grad()
            fake = generator(torch.randn(len(real), NOISE)).detach()
            # One example is a real image and a made one beside it: one backward on both losses.
            (scored(real, True) + scored(fake, False)).backward()
            d_optimizer.step()

            # How many are made here must not depend on how many real images were drawn, so they are
            # judged as public data.
            g_optimizer.zero_grad()
            with engine.public():
                scored(generator(torch.randn(MADE, NOISE)), True).backward()
            g_optimizer.step()
    print(engine.statement())
    return generator, engine.get_privacy_spent().epsilon


if __name__ == "__main__":
    made, epsilon = train()
    image = made(torch.randn(1, NOISE)).detach().reshape(8, 8)
    print("\n".join("".join(" .:*#"[int(2 * v + 2.5)] for v in row) for row in image))
    print(f"epsilon {epsilon:.2f}")
