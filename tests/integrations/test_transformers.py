"""attn_implementation="minbert": eager's outputs and gradients at real tokens, and a clear no to what it cannot do."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5, of the extra [test]")
from minbert.integrations.transformers import RealTokens, packed_attention, real_tokens, register  # noqa: E402
from minbert.kernels import attention_dropout_mask  # noqa: E402

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 50,
    "initializer_range": 0.3,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
    "electra": lambda: transformers.ElectraModel(transformers.ElectraConfig(**SIZES, embedding_size=16)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=60,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
            max_position_embeddings=50,
            initializer_range=0.3,
            attention_dropout=0.0,
            dropout=0.0,
        )
    ),
}
STARTS = {"right": [0, 0, 0], "left": [20, 7, 0], "both sides": [10, 3, 1], "none": [0, 0, 0]}
LENGTHS = {"right": [20, 1, 8], "left": [0, 13, 20], "both sides": [5, 11, 19], "none": [20, 20, 20]}


@pytest.fixture(autouse=True)
def registered() -> None:
    torch.manual_seed(0)
    register()


def padding_mask(side: str) -> Tensor:
    """[3, 20]; with padding on the left, one row is nothing else."""
    start, length = (torch.tensor(table[side])[:, None] for table in (STARTS, LENGTHS))
    at = torch.arange(20)
    return ((at >= start) & (at < start + length)).long()


def both(make) -> tuple[nn.Module, nn.Module]:
    """The same model with eager attention and with ours."""
    eager = make().eval()
    ours = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation("minbert")
    assert (eager.config._attn_implementation, ours.config._attn_implementation) == ("eager", "minbert")
    return eager, ours


def token_ids(mask: Tensor, vocabulary: int = 60) -> Tensor:
    return torch.randint(2, vocabulary, mask.shape) * mask + (1 - mask)


def hidden_and_gradients(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Hidden states of the real tokens [N, D], and by parameter the gradients of something they all have a part in."""
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    towards = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    parameters = {name: p for name, p in model.named_parameters() if "pooler" not in name}
    gradients = torch.autograd.grad((hidden * towards).sum(), list(parameters.values()))
    return {"hidden": hidden.detach(), **dict(zip(parameters, gradients, strict=True))}


def assert_as_exact_as(eager: nn.Module, ours: nn.Module, ids: Tensor, mask: Tensor) -> None:
    """Each result is at most twice as far from float64 as eager's, and some roundings."""
    found, eagers = hidden_and_gradients(ours, ids, mask), hidden_and_gradients(eager, ids, mask)
    exact = hidden_and_gradients(copy.deepcopy(eager).double(), ids, mask)
    largest = max(float(value.norm()) for value in exact.values())
    for name, value in exact.items():
        error, allowed = ((each[name].double() - value).norm() for each in (found, eagers))
        # A key's bias moves all scores of a query alike: its gradient is 0, and what is left are roundings.
        of_roundings = largest if name.endswith(("key.bias", "k_lin.bias", "k_proj.bias")) else float(value.norm())
        assert error <= 2 * allowed + 1e-6 * of_roundings, name


@pytest.mark.parametrize("side", LENGTHS)
@pytest.mark.parametrize("family", MODELS)
def test_real_tokens_get_eagers_outputs_and_gradients(family: str, side: str, native_ops: list[str]) -> None:
    eager, ours = both(MODELS[family])
    mask = padding_mask(side)
    ids = token_ids(mask)
    hidden_and_gradients(ours, ids, mask)
    assert native_ops == ["attention"] * 2 + ["attention_backward"] * 2
    assert_as_exact_as(eager, ours, ids, mask)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_real_model_agrees_with_eager(side: str) -> None:
    directory = os.environ.get("MINBERT_TEST_MODEL")
    if directory is None:
        pytest.skip("MINBERT_TEST_MODEL names no pretrained model")
    eager, ours = both(lambda: transformers.BertModel.from_pretrained(directory))
    mask = padding_mask(side)
    mask = mask[mask.sum(1) > 0]
    ids = token_ids(mask, vocabulary=30000)
    assert_as_exact_as(eager, ours, ids, mask)


def test_from_pretrained_takes_the_name(tmp_path) -> None:
    MODELS["bert"]().save_pretrained(tmp_path)
    model = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="minbert")
    assert model.config._attn_implementation == "minbert"
    assert model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.shape == (1, 3, 32)


def attend(mask: Tensor | None, module: nn.Module | None = None, **options) -> Tensor:
    """Attention of random queries, keys and values [3, 4 heads, 20, 8]."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, 20, 4, 8, generator=generator).transpose(1, 2) for _ in range(3))
    tokens = None if mask is None else RealTokens.from_mask(mask.bool())
    out, probabilities = packed_attention(module or nn.Module(), q, k, v, tokens, **options)
    assert probabilities is None
    return out


@pytest.mark.parametrize("side", LENGTHS)
def test_padding_gives_zeros(side: str) -> None:
    mask = padding_mask(side).bool()
    out = attend(mask)
    assert out.shape == (3, 20, 4, 8)
    assert (out[~mask] == 0).all()
    assert (out[mask] != 0).all()


def test_padding_is_not_read() -> None:
    mask = padding_mask("both sides").bool()
    q, k, v = (torch.randn(3, 4, 20, 8) for _ in range(3))
    clean, _ = packed_attention(nn.Module(), q, k, v, RealTokens.from_mask(mask))
    for x in (q, k, v):
        x.transpose(1, 2)[~mask] = float("nan")
    poisoned, _ = packed_attention(nn.Module(), q, k, v, RealTokens.from_mask(mask))
    assert torch.equal(clean, poisoned)


def test_without_a_mask_every_token_is_real() -> None:
    assert torch.equal(attend(None), attend(torch.ones(3, 20)))
    torch.testing.assert_close(attend(None, scaling=0.0)[:, 0], attend(None, scaling=0.0)[:, 7])  # uniform


def test_training_drops_probabilities_with_a_seed_from_torchs_generator() -> None:
    mask = padding_mask("both sides")

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attend(mask, dropout=0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_kept_probabilities_are_those_of_the_mask_and_weigh_twice() -> None:
    tokens = RealTokens.from_mask(padding_mask("both sides").bool())
    zeros = torch.zeros(3, 4, 20, 8)  # as scores, so that probabilities are 1 / length
    torch.manual_seed(4)
    out, _ = packed_attention(nn.Module(), zeros, zeros, zeros + 1, tokens, dropout=0.5)
    torch.manual_seed(4)
    keep = attention_dropout_mask(tokens.cu_seqlens, 4, 0.5, torch.randint(2**63 - 1, ()), 0)
    blocks = keep.float().split([4 * n * n for n in LENGTHS["both sides"]])
    for row, (block, n) in enumerate(zip(blocks, LENGTHS["both sides"], strict=True)):
        start = STARTS["both sides"][row]
        torch.testing.assert_close(out[row, start : start + n, :, 0], 2 * block.view(4, n, n).mean(2).T)


def test_a_seed_gives_the_training_step() -> None:
    config = transformers.BertConfig(**{**SIZES, "attention_probs_dropout_prob": 0.5}, attn_implementation="minbert")
    model, mask = transformers.BertModel(config).train(), padding_mask("right")
    ids, outs = token_ids(mask), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(ids, attention_mask=mask).last_hidden_state)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable. is deprecated")
def test_gradient_checkpointing_computes_the_same_gradients() -> None:
    config = transformers.BertConfig(**{**SIZES, "attention_probs_dropout_prob": 0.5}, attn_implementation="minbert")
    model, mask = transformers.BertModel(config).train(), padding_mask("right")
    ids, results = token_ids(mask), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        results.append(hidden_and_gradients(model, ids, mask))
    one, other = results
    assert torch.equal(one.pop("hidden"), other.pop("hidden"))
    torch.testing.assert_close(one, other)


def test_the_indices_of_the_tokens_are_computed_once_per_forward(monkeypatch) -> None:
    _, ours = both(MODELS["bert"])
    calls = []
    from_mask = RealTokens.from_mask.__func__
    monkeypatch.setattr(
        RealTokens, "from_mask", classmethod(lambda cls, mask: calls.append(mask) or from_mask(cls, mask))
    )
    mask = padding_mask("right")
    ours(token_ids(mask), attention_mask=mask)
    assert len(calls) == 1


def test_bfloat16_runs_natively(native_ops: list[str]) -> None:
    eager, ours = both(lambda: MODELS["bert"]().bfloat16())
    mask = padding_mask("right")
    ids = token_ids(mask)
    with torch.no_grad():
        exact = copy.deepcopy(eager).float()(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        theirs, mine = (m(ids, attention_mask=mask).last_hidden_state[mask.bool()].float() for m in (eager, ours))
    assert native_ops == ["attention"] * 2
    assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def forward(model: nn.Module, **inputs) -> None:
    model(**{"input_ids": torch.ones(2, 6, dtype=torch.long), **inputs})


HOLES = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"attention_mask": HOLES},
            r"needs adjacent real tokens, got 3 runs of ones in attention_mask\[1\]; .*\"sdpa\"",
        ),
        ({"attention_mask": HOLES * 0}, "needs a real token, got an attention_mask of zeros"),
        ({"attention_mask": torch.ones(2, 5)}, r"is self-attention, got 6 queries for 5 keys"),
        ({"attention_mask": torch.ones(2, 6, 6)}, r"needs an attention_mask \[2, 6\], got \[2, 6, 6\]"),
        ({"attention_mask": torch.zeros(2, 1, 6, 6)}, r"needs a padding mask \[batch, length\], got \[2, 1, 6, 6\]"),
        ({"output_attentions": True}, r"computes no attention probabilities .*set_attn_implementation\(\"eager\"\)"),
        ({"head_mask": torch.ones(2, 4)}, "has no head_mask"),
    ],
)
def test_messages(inputs: dict, message: str) -> None:
    _, ours = both(MODELS["bert"])
    with pytest.raises(ValueError, match=f'^attn_implementation="minbert" {message}'):
        forward(ours, **inputs)


def test_decoders_and_cross_attention_are_refused() -> None:
    decoder = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True, attn_implementation="minbert")
    with pytest.raises(ValueError, match=r"bidirectional.*use model\.set_attn_implementation\(.sdpa.\)"):
        forward(transformers.BertModel(decoder), encoder_hidden_states=torch.randn(2, 6, 32))
    with pytest.raises(ValueError, match="bidirectional self-attention, got a decoder's"):
        attend(None, module=types.SimpleNamespace(is_decoder=True))
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"of one shape, got \[1, 2, 5, 8\], \[1, 2, 4, 8\] and \[1, 2, 4, 8\]"):
        packed_attention(nn.Module(), q, q[:, :, :4], q[:, :, :4], None)


def test_windowed_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="is bidirectional, got causal, windowed or otherwise restricted attention"):
        real_tokens(2, 6, 6, mask_function=lambda *at: True, device="cpu")
    with pytest.raises(ValueError, match="has no sliding_window"):
        attend(None, sliding_window=4)


def test_registering_twice_changes_nothing() -> None:
    register()
    assert transformers.AttentionInterface()["minbert"] is packed_attention
    assert transformers.AttentionMaskInterface()["minbert"] is real_tokens


def test_a_missing_or_old_transformers_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="4.57.1"))
    with pytest.raises(
        ImportError, match=r"must be 5\.0 or newer, got 4\.57\.1; run: pip install -U 'transformers>=5\.0'"
    ):
        register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers is not installed; run: pip install 'transformers>=5\.0'"):
        register()


def test_importing_the_drop_ins_loads_no_transformers() -> None:
    check = "import sys, minbert.integrations, minbert.integrations.transformers; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
