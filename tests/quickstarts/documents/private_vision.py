# The first example of private_vision's README, as it stands there: only `private_vision` has become
# `dptorch.compat.private_vision`, and opacus `dptorch.compat.opacus`. F, batch and labels are given.
# Run by test_attached.py.

import torchvision, torch, dptorch.compat.opacus as opacus
from dptorch.compat.private_vision import PrivacyEngine

model = torchvision.models.resnet18()
# replace BatchNorm by GroupNorm or LayerNorm
model=opacus.validators.ModuleValidator.fix(model)
optimizer = torch.optim.Adam(params=model.parameters(), lr=1e-4)
privacy_engine = PrivacyEngine(
    model,
    batch_size=256,
    sample_size=50000,
    epochs=3,
    max_grad_norm=0.1,
    target_epsilon=3,
    ghost_clipping=True,
    mixed=True,
)
privacy_engine.attach(optimizer)

# Same training procedure, e.g. data loading, forward pass, logits...
loss = F.cross_entropy(model(batch), labels, reduction="none")
# do not use loss.backward()
optimizer.step(loss=loss)
