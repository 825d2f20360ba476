# The second example of private_vision's README, as it stands there, from `for` on: what it abbreviates
# before (`PrivacyEngine(...)`) is given, with F and dataloader. Run by test_attached.py.

for i, batch in enumerate(dataloader):
    loss = F.cross_entropy(model(batch), labels, reduction="none")
    if i % gradient_accumulation_steps == 0:
        optimizer.step(loss=loss)
        optimizer.zero_grad()
    else:
        optimizer.virtual_step(loss=loss)
