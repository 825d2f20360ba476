"""Attention and recurrence, in every layout."""

import torch
from tests.tape.zoo.base import B, Case, Lambda, case, squares
from torch import Tensor, nn

# -- attention and recurrence ----------------------------------------------------------------------


@case
def attention_batch_first() -> Case:
    model = Lambda(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True))
    return Case(model, (torch.randn(B, 5, 8),), squares)


@case
def attention_sequence_first() -> Case:
    model = Lambda(
        lambda m, x: m.a(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1),
        a=nn.MultiheadAttention(8, 2, bias=True, add_bias_kv=True),
    )
    return Case(model, (torch.randn(B, 5, 8),), squares)


@case
def transformer_encoder_masked() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = Lambda(
        lambda m, x, keep: m.e(x, src_key_padding_mask=keep), e=nn.TransformerEncoder(layer, 2)
    )
    keep = torch.zeros(B, 5, dtype=torch.bool)
    keep[:, 3:] = True
    return Case(model, (torch.randn(B, 5, 8), keep), squares)


@case
def lstm_and_gru() -> Case:
    model = Lambda(
        lambda m, x: m.g(m.l(x)[0].transpose(0, 1))[0].transpose(0, 1),
        l=nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True),
        g=nn.GRU(8, 3),
    )
    return Case(model, (torch.randn(B, 5, 6),), squares)


@case
def transformer_batch_first() -> Case:
    model = Lambda(
        lambda m, x, y: m.h(
            m.t(x, y, tgt_mask=m.t.generate_square_subsequent_mask(4), tgt_is_causal=True)
        ),
        h=nn.Linear(8, 2),
        t=nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True),
    )
    return Case(model, (torch.randn(B, 5, 8), torch.randn(B, 4, 8)), squares)


@case
def transformer_sequence_first() -> Case:
    model = Lambda(
        lambda m, x, y: m.h(m.t(x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1)),
        h=nn.Linear(8, 2),
        t=nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, norm_first=True),
    )
    return Case(model, (torch.randn(B, 5, 8), torch.randn(B, 4, 8)), squares)


@case
def attention_with_masks() -> Case:
    def run(m: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        return m.a(x, x, x, key_padding_mask=keep, attn_mask=causal)[0]

    keep = torch.zeros(B, 5, dtype=torch.bool)
    keep[1:, 4:] = True
    model = Lambda(run, a=nn.MultiheadAttention(8, 2, batch_first=True, kdim=8, vdim=8))
    return Case(model, (torch.randn(B, 5, 8), keep), squares)


@case
def attention_of_different_widths() -> Case:
    model = Lambda(
        lambda m, x, y: m.a(x, y, y)[0],
        a=nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6),
    )
    return Case(model, (torch.randn(B, 5, 8), torch.randn(B, 3, 6)), squares)


@case
def learned_queries() -> Case:
    model = Lambda(
        lambda m, x: m.a(m.q.expand(x.shape[0], -1, -1), x, x)[0],
        q=torch.randn(1, 3, 8), a=nn.MultiheadAttention(8, 2, batch_first=True),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 5, 8),), squares)


@case
def rnn_cells() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 4)
        g = r = x.new_zeros(x.shape[0], 3)
        for t in range(x.shape[1]):
            h, c = m.l(x[:, t], (h, c))
            g = m.g(h, g)
            r = m.r(g, r)
        return r

    model = Lambda(run, l=nn.LSTMCell(6, 4), g=nn.GRUCell(4, 3), r=nn.RNNCell(3, 3))
    return Case(model, (torch.randn(B, 4, 6),), squares)


@case
def rnn_with_projection() -> Case:
    model = Lambda(
        lambda m, x: m.r(m.l(x)[0])[0],
        l=nn.LSTM(6, 4, 2, batch_first=True, proj_size=3),
        r=nn.RNN(3, 3, nonlinearity="relu", batch_first=True),
    )
    return Case(model, (torch.randn(B, 5, 6),), squares)


@case
def packed_sequences() -> Case:
    lengths = torch.tensor([3, 5, 1, 5])

    def run(m: nn.Module, x: Tensor, n: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, n.cpu(), batch_first=True, enforce_sorted=False
        )
        out, (h, _) = m.l(packed)
        out, _ = m.g(out)
        padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        return m.h(padded).flatten(1).sum(1, keepdim=True) + h.transpose(0, 1).flatten(1)

    model = Lambda(
        run,
        l=nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True),
        g=nn.GRU(8, 3),
        h=nn.Linear(3, 2),
    )
    return Case(model, (torch.randn(B, 5, 6), lengths), squares)


@case
def state_passed_on() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        state = None
        for part in x.chunk(2, 1):
            out, state = m.l(part, state)
        return m.d(out, state)[0]

    model = Lambda(run, l=nn.LSTM(6, 4, batch_first=True), d=nn.LSTM(4, 4, batch_first=True))
    return Case(model, (torch.randn(B, 6, 6),), squares)
