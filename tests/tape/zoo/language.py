"""Language models, untouched, in their default call."""

import torch
import torch.nn.functional as F
from tests.tape.zoo.base import B, Case, case, labels
from torch import Tensor, nn


@case
def gpt2_tied() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Case(GPT2LMHeadModel(config), (torch.randint(0, 40, (B, 7)),), causal_lm)


def causal_lm(model: nn.Module, ids: Tensor) -> Tensor:
    """One loss for each example from the model's own scalar mean loss."""
    return model(ids, labels=ids).loss * ids.shape[0]


def _tiny(kind: str, **extra: object) -> nn.Module:
    import transformers

    config_class, model_class = {
        "bert": ("BertConfig", "BertForSequenceClassification"),
        "roberta": ("RobertaConfig", "RobertaForSequenceClassification"),
        "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "opt": ("OPTConfig", "OPTForCausalLM"),
        "t5": ("T5Config", "T5ForConditionalGeneration"),
        "bart": ("BartConfig", "BartForConditionalGeneration"),
    }[kind]
    config = getattr(transformers, config_class)(**extra)
    return getattr(transformers, model_class)(config)


_ENCODER = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 20, "max_position_embeddings": 24, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_DECODER = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 20, "max_position_embeddings": 24,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def _sequence_case(model: nn.Module) -> Case:
    mask = torch.ones(B, 7, dtype=torch.long)
    mask[1, 4:] = 0

    def loss(m: nn.Module, ids: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(ids, attention_mask=mask).logits, y, reduction="none")

    return Case(model, (torch.randint(3, 40, (B, 7)), mask, labels()), loss)


@case
def bert() -> Case:
    return _sequence_case(_tiny("bert", **_ENCODER))


@case
def roberta() -> Case:
    return _sequence_case(_tiny("roberta", **_ENCODER | {"pad_token_id": 1}))


@case
def distilbert() -> Case:
    model = _tiny(
        "distilbert", vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=20, num_labels=3,
        max_position_embeddings=24, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return _sequence_case(model)


@case
def llama() -> Case:
    return Case(_tiny("llama", **_DECODER), (torch.randint(3, 40, (B, 7)),), causal_lm)


@case
def qwen2_tied() -> Case:
    model = _tiny("qwen2", **_DECODER, tie_word_embeddings=True)
    return Case(model, (torch.randint(3, 40, (B, 7)),), causal_lm)


@case
def opt() -> Case:
    model = _tiny(
        "opt", vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=20, max_position_embeddings=24, word_embed_proj_dim=16, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, pad_token_id=1, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    return Case(model, (torch.randint(3, 40, (B, 7)),), causal_lm)


@case
def t5_relative_bias() -> Case:
    model = _tiny(
        "t5", vocab_size=40, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Case(model, (torch.randint(3, 40, (B, 7)), torch.randint(3, 40, (B, 5))), seq2seq)


@case
def bart() -> Case:
    model = _tiny(
        "bart", vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20,
        decoder_ffn_dim=20, max_position_embeddings=24, dropout=0.0, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return Case(model, (torch.randint(3, 40, (B, 7)), torch.randint(3, 40, (B, 5))), seq2seq)


def seq2seq(model: nn.Module, ids: Tensor, target: Tensor) -> Tensor:
    return model(input_ids=ids, labels=target).loss * ids.shape[0]


@case
def lora_on_gpt2() -> Case:
    from peft import LoraConfig, get_peft_model

    base = gpt2_tied()
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(base.model, config).to(torch.float64)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)  # zero at first, which would hide errors in lora_A
    return Case(model, base.batch, base.loss)


_GPT = {
    "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def _build(kind: str, **settings: object) -> nn.Module:
    """A randomly initialised transformers model by class name."""
    import transformers

    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**settings))  # type: ignore[no-any-return]


def _lm(kind: str, **settings: object) -> Case:
    return Case(_build(kind, **_DECODER | settings), (torch.randint(3, 40, (B, 7)),), causal_lm)


def _double_heads(model: nn.Module) -> Case:
    """Two choices for each example; the last token of each scores it."""

    def loss(m: nn.Module, ids: Tensor, last: Tensor, y: Tensor) -> Tensor:
        out = m(ids, mc_token_ids=last)
        words = F.cross_entropy(
            out.logits[..., :-1, :].flatten(0, 2), ids[..., 1:].flatten(), reduction="none"
        )
        choices = F.cross_entropy(out.mc_logits, y, reduction="none")
        return words.view(ids.shape[0], -1).mean(1) + choices

    last = torch.full((B, 2), 5)
    return Case(model, (torch.randint(0, 40, (B, 2, 6)), last, torch.randint(0, 2, (B,))), loss)


@case
def openai_gpt() -> Case:
    model = _build("OpenAIGPTLMHeadModel", **_GPT)
    return Case(model, (torch.randint(0, 40, (B, 7)),), causal_lm)


@case
def openai_gpt_double_heads() -> Case:
    return _double_heads(
        _build("OpenAIGPTDoubleHeadsModel", **_GPT, summary_first_dropout=0.0, num_labels=1)
    )


@case
def gpt2_double_heads() -> Case:
    model = _build(
        "GPT2DoubleHeadsModel", **_GPT, summary_first_dropout=0.0, num_labels=1, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return _double_heads(model)


@case
def albert() -> Case:
    return _sequence_case(
        _build(
            "AlbertForSequenceClassification",
            **_ENCODER,
            embedding_size=8,
            classifier_dropout_prob=0.0,
        )
    )


@case
def mistral() -> Case:
    return _lm("MistralForCausalLM", head_dim=8, sliding_window=4)


@case
def bloom_alibi() -> Case:
    model = _build(
        "BloomForCausalLM", vocab_size=40, hidden_size=16, n_layer=2, n_head=2,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return Case(model, (torch.randint(3, 40, (B, 7)),), causal_lm)


@case
def qwen3_tied() -> Case:
    return _lm("Qwen3ForCausalLM", head_dim=8, tie_word_embeddings=True)


@case
def gemma2() -> Case:
    return _lm("Gemma2ForCausalLM", head_dim=8, query_pre_attn_scalar=8, sliding_window=4)


@case
def gemma3() -> Case:
    return _lm("Gemma3ForCausalLM", head_dim=8, query_pre_attn_scalar=8, sliding_window=4)


@case
def phi3() -> Case:
    return _lm("Phi3ForCausalLM")


@case
def gpt_neox() -> Case:
    return _lm("GPTNeoXForCausalLM", num_key_value_heads=2)


@case
def mamba() -> Case:
    model = _build(
        "MambaForCausalLM", vocab_size=40, hidden_size=12, state_size=4, num_hidden_layers=2,
        time_step_rank=3, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Case(model, (torch.randint(3, 40, (B, 7)),), causal_lm)


@case
def mixtral() -> Case:
    def loss(m: nn.Module, ids: Tensor) -> Tensor:
        return m(ids, labels=ids, output_router_logits=False).loss * ids.shape[0]

    built = _lm(
        "MixtralForCausalLM",
        num_local_experts=3,
        num_experts_per_tok=2,
        experts_implementation="batched_mm",
    )
    return Case(built.model, built.batch, loss)


@case
def whisper() -> Case:
    model = _build(
        "WhisperForConditionalGeneration", vocab_size=40, num_mel_bins=4, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=20, decoder_ffn_dim=20, max_source_positions=8, max_target_positions=12,
        dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip

    def loss(m: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return m(input_features=x, labels=target).loss * x.shape[0]

    return Case(model, (torch.randn(B, 4, 16), torch.randint(3, 40, (B, 5))), loss)


def _peft(config: object) -> Case:
    from peft import get_peft_model

    base = gpt2_tied()
    model = get_peft_model(base.model, config).to(torch.float64)
    return Case(model, base.batch, base.loss)


@case
def prefix_tuning() -> Case:
    from peft import PrefixTuningConfig

    return _peft(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


@case
def prompt_tuning() -> Case:
    from peft import PromptTuningConfig

    return _peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


@case
def ia3() -> Case:
    from peft import IA3Config

    return _peft(
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        )
    )


@case
def bitfit() -> Case:
    base = bert()
    for name, p in base.model.named_parameters():
        p.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    return base
