# The second example of private-transformers' README, as it stands there: only `private_transformers` has
# become `dptorch.compat.private_transformers`. Run by test_attached.py.

import transformers, torch
from dptorch.compat.private_transformers import PrivacyEngine

device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
model = transformers.GPT2LMHeadModel.from_pretrained('distilgpt2').to(device)
optimizer = torch.optim.Adam(params=model.parameters(), lr=1e-4)
privacy_engine = PrivacyEngine(
    model,
    batch_size=10,
    sample_size=50000,
    epochs=3,
    max_grad_norm=0.1,
    target_epsilon=3,
    clipping_mode="ghost", # The only change you need to make!
)
privacy_engine.attach(optimizer)
