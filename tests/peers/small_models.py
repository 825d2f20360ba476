"""Small random models, vocabularies and their tokenizers in the place of published ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.peers.data_files import WORDS

__all__ = ["random_timm_weights", "random_vision_weights", "random_weights"]

#: Size of the byte-level vocabulary: GPT-2's ids of line breaks, which a script forbids, are below it.
_VOCABULARY = 720
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "intermediate_size": 64,
    "vocab_size": _VOCABULARY,
}
_OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": _VOCABULARY}
#: Names of published models -> the type of the model, and sizes of a small one.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "distilbert": (
        "distilbert",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": _VOCABULARY},
    ),
    "roberta": ("roberta", _SMALL | {"type_vocab_size": 1, "max_position_embeddings": 514}),
    "albert": ("albert", _SMALL | {"embedding_size": 16}),
    "bert": ("bert", _SMALL),
    "openai-gpt": ("openai-gpt", _GPT),
    "gpt2": ("gpt2", _GPT),
    "opt-125m": ("opt", _OPT | {"vocab_size": _VOCABULARY, "word_embed_proj_dim": 32}),
    "opt-350m": (
        "opt",
        _OPT
        | {"vocab_size": _VOCABULARY, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bart": (
        "bart",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": _VOCABULARY}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    ),
    "t5": (
        "t5",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        | {"vocab_size": _VOCABULARY},
    ),
    "beit": ("beit", {k: v for k, v in _SMALL.items() if k != "vocab_size"}),
    # The published DeiT without distillation is of the type of a ViT.
    **dict.fromkeys(
        ["deit", "vit"], ("vit", {k: v for k, v in _SMALL.items() if k != "vocab_size"})
    ),
}


def config(name: str, **settings: Any) -> Any:
    """The configuration of a small model of the published one's type."""
    import transformers

    for pattern, (kind, sizes) in _MODELS.items():
        if pattern in name:
            return transformers.AutoConfig.for_model(kind, **sizes | settings)
    raise ValueError(f"{name!r} has no small model; expected a name with one of {list(_MODELS)}")


def byte_level_tokenizer(kind: Any) -> Any:
    """A tokenizer of class `kind` over single bytes and the words of `data_files`."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    text = " ".join(WORDS * 20 + ["It", "was", "terrible", "great", "yes", "no", "maybe"] * 20)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    trained.train_from_iterator(
        [text], vocab_size=600, min_frequency=1, special_tokens=special, show_progress=False
    )
    model = json.loads(trained._tokenizer.to_str())["model"]
    vocabulary = dict(model["vocab"])
    vocabulary |= {f"unused{i}": i for i in range(len(vocabulary), _VOCABULARY)}
    merges = [tuple(merge) for merge in model["merges"]]
    return kind(vocab=vocabulary, merges=merges, model_max_length=512)


def tokenizer() -> Any:
    """A tokenizer of the words in `data_files`, BERT's special tokens among them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def random_vision_weights() -> None:
    """Let models of torchvision be without published weights."""
    from torchvision import models

    def unpublished(build: Callable[..., Any]) -> Callable[..., Any]:
        def built(*_: Any, pretrained: Any = None, weights: Any = None, **settings: Any) -> Any:
            return build(**settings)

        return built

    for name in models.list_models(module=models):
        setattr(models, name, unpublished(getattr(models, name)))


def random_timm_weights() -> None:
    """Let models of timm be without published weights."""
    import timm

    made = timm.create_model
    timm.create_model = lambda name, pretrained=False, **kwargs: made(name, **kwargs)


def random_weights() -> None:
    """Let ``from_pretrained`` of a published name be a small model; folders are read as always."""
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    def model(kind: Any, name: str, *, config: Any = None, **_: Any) -> Any:
        wanted = config if config is not None else small_config(kind, name)
        auto = issubclass(kind, _BaseAutoModelClass)
        return kind.from_config(wanted) if auto else kind(wanted)

    def small_config(kind: Any, name: str, cache_dir: Any = None, **settings: Any) -> Any:
        return config(name, **settings)

    def byte_level(kind: Any, name: str, **_: Any) -> Any:
        auto = kind is transformers.AutoTokenizer
        return byte_level_tokenizer(transformers.RobertaTokenizer if auto else kind)

    _replace(transformers.AutoConfig, small_config)
    _replace(transformers.PretrainedConfig, small_config)
    _replace(transformers.PreTrainedModel, model)
    _replace(_BaseAutoModelClass, model)
    _replace(transformers.AutoTokenizer, byte_level)
    _replace(transformers.GPT2Tokenizer, byte_level)
    for words in {transformers.BertTokenizer, transformers.BertTokenizerFast}:
        _replace(words, lambda kind, name, **_: tokenizer())


def _replace(kind: Any, make: Callable[..., Any]) -> None:
    """Let ``kind.from_pretrained(name)`` make what it returns, where `name` is no folder."""
    original = kind.from_pretrained.__func__

    def load(cls: Any, name: Any, *args: Any, **settings: Any) -> Any:
        if Path(name).exists() or not re.match(r"[\w./-]+$", str(name)):
            return original(cls, name, *args, **settings)
        return make(cls, str(name), **settings)

    kind.from_pretrained = classmethod(load)
