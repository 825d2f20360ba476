"""Opacus: its suite, its examples, and why some do not pass."""

from __future__ import annotations

from tests.peers.examples import Example
from tests.peers.peer import Peer
from tests.peers.reasons import NOT_APPLICABLE, REFUSED, Reason

__all__ = ["OPACUS"]

_ONE = "--epochs 1 --workers 0 "
_CIFAR = "--epochs 1 --batch-size 20 --workers 0 "
_VISION = "--batch-size 2 --height 32 --width 32 --steps 2 --workers 0 "

_EXAMPLES = (
    Example("examples/mnist.py", "--device cpu --epochs 1 --batch-size 16"),
    Example("examples/cifar10.py", _CIFAR),
    Example("examples/cifar10.py", _CIFAR + "--clip_per_layer", "examples/cifar10.py, per layer"),
    Example("examples/cifar10.py", _CIFAR + "--grad_sample_mode ew", "examples/cifar10.py, ew"),
    Example(
        "examples/cifar10.py", _CIFAR + "--grad_sample_mode no_op", "examples/cifar10.py, no_op"
    ),
    Example(
        "examples/dcgan.py",
        _ONE + "--device cpu --batch-size 4 --ndf 8 --ngf 8 --data-root {data}",
    ),
    Example("examples/imdb.py", _ONE + "--device cpu --batch-size 6"),
    Example(
        "examples/char-lstm-classification.py",
        "--device cpu --epochs 1 --batch-size 8 --data-root {data}/names",
    ),
    Example(
        "examples/char-lstm-classification.py",
        "--device cpu --epochs 1 --batch-size 8 --mode gru --data-root {data}/names",
        "examples/char-lstm-classification.py, gru",
    ),
    Example("examples/vision_benchmark.py", _VISION),
    Example(
        "examples/vision_benchmark.py",
        _VISION + "--benchmark-data-loader",
        "examples/vision_benchmark.py, with its loader",
    ),
    Example("examples/mnist_lightning.py", "fit"),
    Example("examples/fsdp_example.py", gpus=2),
    Example("examples/fsdp_llama3.py", gpus=2),
    Example("examples/tensor_parallelism_toy.py", gpus=2),
    Example("examples/tensor_parallelism_llama.py", gpus=2),
    *(
        Example(f"tutorials/{name}.py", name=f"tutorials/{name}.ipynb")
        for name in (
            "building_image_classifier",
            "building_lstm_name_classifier",
            "building_text_classifier",
            "ddp_tutorial",
            "guide_to_grad_sampler",
            "guide_to_module_validator",
            "intro_to_advanced_features",
        )
    ),
)

_READS = "AttributeError|is not true|has no attribute|ImportError"

_REASONS = (
    # -- refused on purpose ------------------------------------------------------------------------
    Reason(
        REFUSED, "batch_memory_manager_test", r"examples meet in 'sub'|FlakyFailure|ExceptionGroup",
        "The loss `(y - out).mean()` takes y [B] from out [B, 1], which is [B, B]: it pairs every "
        "example with every other, and is refused.",
    ),
    Reason(
        REFUSED, "dpdataloader_test|test_empty_batch", "1 != 0|True is not false",
        "An empty batch arrives as one row of zeros without weight, not as no row.",
    ),
    Reason(
        REFUSED, "get_noise_multiplier", "places|!=",
        "The noise is the least that meets the target (to 0.02 %); Opacus stops its search earlier, "
        "at more noise.",
    ),
    Reason(
        REFUSED, "test_prv_accountant", "6.767.* != 6.777",
        "Numerical composition here is an upper bound by a theorem, 0.01 below: the error that Opacus "
        "adds.",
    ),
    Reason(
        REFUSED, "[Dd]istributed|multigpu", "in one process|No module",
        "Several processes train with `dptorch.PrivacyEngine` (scale.md), not with the adapter.",
    ),
    Reason(
        REFUSED, "", "a DPOptimizer cannot be made alone",
        "A `DPOptimizer` is made by `make_private`, together with model and loader.",
    ),
    Reason(
        REFUSED, "", r"GradSampleModule\(batch_first=False",
        "`batch_first` and `loss_reduction` are arguments of `make_private`; on a `GradSampleModule` "
        "made by hand they would change nothing.",
    ),
    Reason(
        REFUSED, "module_validator_test", "replace_bn_with_in",
        "InstanceNorm has no place for the scale and shift that BatchNorm learned.",
    ),
    Reason(
        REFUSED, "test_is_valid_non_learnable_bn", "not true",
        "A BatchNorm without trainable parameters mixes the examples of a batch all the same, and is "
        "not valid here.",
    ),
    Reason(
        REFUSED, "test_validate_training_mode", "not false",
        "A model in eval mode is valid: its gradients are followed too.",
    ),
    Reason(
        REFUSED, "randomness_test.*(SecureModeTest|SecureMode)", "the loss is a sum over the examples",
        "The loss `out.sum()` with `loss_reduction='mean'` would make gradients too large by the batch "
        "size, and is refused.",
    ),
    Reason(
        REFUSED, "test_deterministic_run", "must match",
        "`torch.manual_seed` makes neither batches nor noise known.",
    ),
    Reason(
        REFUSED, "test_noise_level", "within .* delta",
        "`torch.manual_seed` does not make noise known, and without it the test's bound of 15 % on a "
        "sum of 160 squares is exceeded in one run of five.",
    ),
    Reason(
        REFUSED, "privacy_engine_test.*test_checkpoints", "another plan|plan",
        "A checkpoint is loaded into a run with the same plan: with another noise multiplier what was "
        "spent would not be known.",
    ),
    Reason(
        REFUSED, "PrivacyEngineTextTest.*test_make_private_with_epsilon", "MultiheadAttention",
        "The test leaves out `batch_first=False`, so that Opacus clips positions in the place of "
        "examples, in silence. Attention over what is then taken for examples is refused.",
    ),
    Reason(
        REFUSED, "test_per_layer_clipping", "signal_skip_step",
        "`signal_skip_step` is a part of Opacus's `BatchMemoryManager`; the error names "
        "`BatchMemoryManager` and `virtual_step`.",
    ),
    Reason(
        REFUSED, "test_global_seed|test_.*seed", "must match the size|not true|False is not",
        "`torch.manual_seed` makes neither batches nor noise known.",
    ),
    Reason(
        REFUSED, "gradient_accumulation_test", "backpropagated but never stepped|ValueError not raised",
        "Batches of the private loader are not added up by hand: each is a whole logical batch, and "
        "`BatchMemoryManager` bounds memory. A loop that is left early leaves nothing behind: "
        "the batch is drawn again.",
    ),
    Reason(
        REFUSED, "Validation|validation", "RuntimeError not raised|NotImplementedError not raised",
        "Layers that Opacus does not support are supported.",
    ),
    Reason(
        REFUSED, "test_custom_module_validation", "NotImplementedError not raised",
        "Layers that Opacus does not support are supported; what mixes examples is refused by "
        "`make_private`.",
    ),
    Reason(
        REFUSED, "no_op", "grad_sample_mode='no_op'",
        "Gradients that the user computes cannot be vouched for.",
    ),
    # -- not applicable ----------------------------------------------------------------------------
    Reason(
        NOT_APPLICABLE, "", "grad_sample'|grad_samples|GRAD_SAMPLERS|gradients are not kept",
        "Reads `p.grad_sample`: per-example gradients are not kept on parameters.",
    ),
    Reason(
        NOT_APPLICABLE, "", "no attribute 'summed_grad'",
        "Reads `p.summed_grad`: clipped sums without noise are not kept on parameters.",
    ),
    Reason(
        NOT_APPLICABLE, "tutorials/(guide_to|ddp)", "SyntaxError",
        "Its cells are no Python: pseudo code, or commands of Jupyter that begin several processes.",
    ),
    Reason(
        NOT_APPLICABLE, "building_lstm", "missing 1 required positional argument: 'privacy_engine'",
        "Private training runs to its end. The cell after it, without privacy, leaves out an argument "
        "of the notebook's own function, with Opacus too.",
    ),
    Reason(
        REFUSED, "intro_to_advanced", "grad_sample",
        "Builds the engine by hand from its parts, and reads `p.grad_sample`; `make_private` is the "
        "call.",
    ),
    Reason(
        NOT_APPLICABLE, "FastGradientClipping", "max_grad_norm' is not known|is not in dptorch",
        "Builds Opacus's ghost clipping by hand from its parts; "
        "`make_private(grad_sample_mode='ghost')` is the call.",
    ),
    Reason(
        NOT_APPLICABLE, "hooks", "enable_hooks|disable_hooks|_hooks",
        "Switches Opacus's hooks on and off.",
    ),
    Reason(
        NOT_APPLICABLE, "", "unfold2d|embedding_norm_sample|_generate_noise|is not in dptorch",
        "Calls a function with which Opacus computes single layers.",
    ),
    Reason(
        NOT_APPLICABLE, "validators/", "VALIDATORS|FIXERS",
        "Reads the registry of `ModuleValidator`.",
    ),
    Reason(
        NOT_APPLICABLE, "standard_module_validation|_hooks", "False is not true",
        "Looks for `ft_compute_sample_grad`, an attribute of Opacus's hooks.",
    ),
    Reason(
        NOT_APPLICABLE, "module_validator_test.*test_fix$", "0 not greater than 0",
        "Counts Opacus's log messages.",
    ),
    Reason(
        NOT_APPLICABLE, "mnist_lightning", "pl_bolts|pytorch_lightning.utilities.cli",
        "Written for Lightning 1 and `pl_bolts`, so it runs with Opacus neither. "
        "`examples/lightning_loop.py` is a loop for Lightning 2.",
    ),
    Reason(
        NOT_APPLICABLE, "", "needs 2 GPUs",
        "Needs several GPUs and several processes.",
    ),
)  # fmt: skip

OPACUS = Peer(
    name="Opacus",
    packages={"opacus": "dptorch.compat.opacus"},
    tests=("opacus/tests", "*_test.py"),
    folders=("examples", "tutorials"),
    examples=_EXAMPLES,
    reasons=_REASONS,
)
