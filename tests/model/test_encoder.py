"""The encoder against transformers' BertModel, its dropout and its limits."""

from __future__ import annotations

import copy
import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from minbert import kernels
from minbert.data.packing import Packed, pack
from minbert.data.tokenizer import Tokenizer
from minbert.kernels import use_backend
from minbert.methods.task_gradients import TaskGradients
from minbert.model import Encoder, EncoderConfig


def one_by_one(theirs: transformers.BertModel, packed: Packed) -> Tensor:
    """transformers' hidden states of each sequence on its own, so without any padding, end to end."""
    lengths = packed.lengths.tolist()
    rows = zip(packed.token_ids.split(lengths), packed.token_type_ids.split(lengths), strict=True)
    return torch.cat([theirs(ids[None], token_type_ids=types[None]).last_hidden_state[0] for ids, types in rows])


def alone(packed: Packed) -> list[Packed]:
    """Each sequence as a batch of its own."""
    lengths = packed.lengths.tolist()
    rows = zip(packed.token_ids.split(lengths), packed.token_type_ids.split(lengths), strict=True)
    return [pack([ids.tolist()], [types.tolist()]) for ids, types in rows]


def gradients(encoder: Encoder, hidden: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Gradients of <hidden, direction> under transformers' names."""
    hidden.backward(direction.to(hidden.dtype))
    by_name = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter, source in zip(by_name.parameters(), encoder.parameters(), strict=True):
            parameter.copy_(source.grad)
    return by_name.huggingface_tensors(pooler=False)


def their_gradients(theirs: transformers.BertModel, packed: Packed, direction: Tensor) -> dict[str, Tensor]:
    hidden = one_by_one(theirs, packed)
    hidden.backward(direction.to(hidden.dtype))
    return {name: parameter.grad for name, parameter in theirs.named_parameters() if "pooler" not in name}


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.detach().double() - exact).norm() / exact.norm()).item()


def real_sentences(tokenizer: Tokenizer) -> Packed:
    """Reviews cut to lengths from 1 to 512 tokens, and the first sentences and pairs of the other tasks."""
    data = os.environ.get("MINBERT_TEST_DATA")
    if data is None:
        pytest.skip("MINBERT_TEST_DATA names no data")
    rows = {}
    for stem in ("ids-cfimdb", "ids-sst", "quora", "sts"):
        with (Path(data) / f"{stem}-dev.csv").open(encoding="utf-8", newline="") as file:
            rows[stem] = list(csv.reader(file, delimiter="\t"))[1:]
    words = [word for row in rows["ids-cfimdb"] for word in tokenizer.encode(row[2])[1:-1]]
    lengths = [*range(1, 20), 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 200, 255, 256, 257, 384, 511, 512]
    ids = [[tokenizer.cls_id, *words[7 * n :][: n - 1]] for n in lengths]
    ids += [tokenizer.encode(row[2], max_length=512) for row in rows["ids-sst"][:32]]
    ids += [tokenizer.encode(row[2], row[3], 512) for stem in ("quora", "sts") for row in rows[stem][:32]]
    return pack(ids, [tokenizer.token_type_ids(row) for row in ids])


@torch.no_grad()
def test_hidden_states_equal_transformers_on_the_pretrained_model_and_real_sentences(pretrained: Path) -> None:
    packed = real_sentences(Tokenizer.from_pretrained(pretrained))
    encoder = Encoder.from_pretrained(pretrained)
    expected = one_by_one(transformers.BertModel.from_pretrained(pretrained).eval(), packed)
    together = encoder(packed)
    separate = torch.cat([encoder(sequence) for sequence in alone(packed)])
    print(
        f"max difference: packed {(together - expected).abs().max():.2e}, alone {(separate - expected).abs().max():.2e}"
    )
    assert (together - expected).abs().max() < 2e-5
    assert (separate - expected).abs().max() < 2e-5


@torch.no_grad()
def test_hidden_states_and_pooler_equal_transformers_in_float64(
    theirs: transformers.BertModel, checkpoint: Path, packed: Packed
) -> None:
    encoder = Encoder.from_pretrained(checkpoint).double()
    hidden = encoder(packed)
    assert hidden.dtype == torch.float64
    torch.testing.assert_close(hidden, one_by_one(theirs.double(), packed), rtol=1e-12, atol=1e-12)
    pooled = torch.cat([theirs(s.token_ids[None], token_type_ids=s.token_type_ids[None])[1] for s in alone(packed)])
    torch.testing.assert_close(encoder.pool(hidden, packed, "pooler"), pooled, rtol=1e-12, atol=1e-12)


def test_gradients_equal_transformers_in_float64(
    theirs: transformers.BertModel, checkpoint: Path, packed: Packed
) -> None:
    encoder = Encoder.from_pretrained(checkpoint, pooler=False).double()
    direction = torch.randn(len(packed.token_ids), 32, dtype=torch.float64)
    ours = gradients(encoder, encoder(packed), direction)
    expected = their_gradients(theirs.double(), packed, direction)
    assert ours.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-11, atol=1e-13 * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_and_gradients_are_as_near_to_float64_as_transformers(
    theirs: transformers.BertModel, checkpoint: Path, packed: Packed, dtype: torch.dtype
) -> None:
    encoder = Encoder.from_pretrained(checkpoint, pooler=False)
    encoder.compute_dtype = dtype
    direction = torch.randn(len(packed.token_ids), 32)
    double = copy.deepcopy(theirs).double()
    rounded = theirs.to(dtype)
    with torch.no_grad():
        exact, their_hidden = one_by_one(double, packed), one_by_one(rounded, packed)
    hidden = encoder(packed)
    assert hidden.dtype == dtype
    assert relative_error(hidden, exact) <= 2 * relative_error(their_hidden, exact)
    ours, exact_gradients = gradients(encoder, hidden, direction), their_gradients(double, packed, direction)
    their_rounded = their_gradients(rounded, packed, direction)
    exact, got, reference = (
        torch.cat([table[name].double().flatten() for name in exact_gradients])
        for table in (exact_gradients, ours, their_rounded)
    )
    assert relative_error(got, exact) <= 2 * relative_error(reference, exact)
    assert all(parameter.grad.dtype == parameter.dtype == torch.float32 for parameter in encoder.parameters())


def test_embed_then_encode_is_forward_to_the_bit(tiny_config: EncoderConfig, packed: Packed) -> None:
    encoder, seed = Encoder(tiny_config).train(), torch.tensor(3)
    assert torch.equal(encoder.encode(encoder.embed(packed, seed), packed, seed), encoder(packed, seed=seed))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_first_tokens_are_those_of_all_tokens_with_their_gradients(
    tiny_config: EncoderConfig, packed: Packed, dtype: torch.dtype, backend: str
) -> None:
    """Under dropout, for two tasks; nothing but rounding differs."""
    config = replace(tiny_config, hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.4)
    encoder, seed = Encoder(config).double().train(), torch.tensor([3, 2**32 - 5])
    if dtype != torch.float64:
        encoder.float().compute_dtype = dtype
    sequences = len(packed.cu_seqlens) - 1
    packed = packed.by_task([1, sequences - 1])
    direction = torch.randn(sequences, config.hidden_size, generator=torch.Generator().manual_seed(1))

    def first(some: Encoder) -> Tensor:
        return some.encode(some.embed(packed, seed), packed, seed, first_tokens=True)

    def rows_of_all(some: Encoder) -> Tensor:
        return some.encode(some.embed(packed, seed), packed, seed)[packed.cu_seqlens[:-1]]

    def results(some: Encoder, function) -> list[Tensor]:
        gradients = TaskGradients(some, 2)
        with gradients.attached():
            out = function(some)
        out.backward(direction.to(out.dtype))
        flat = [torch.cat([grad.flatten() for grad in row if grad is not None]) for row in gradients.rows]
        return [out.detach(), *flat]

    with use_backend(backend):
        got, wanted = results(encoder, first), results(encoder, rows_of_all)
    encoder.double().compute_dtype = torch.float64
    exact = results(encoder, rows_of_all)
    for some, others, true in zip(got, wanted, exact, strict=True):
        assert some.dtype == others.dtype
        bound = 1e-13 if dtype == torch.float64 else 2 * relative_error(others, true) + 1e-6
        assert relative_error(some, true) <= bound


def test_dropout_follows_the_seed(tiny_config: EncoderConfig, packed: Packed) -> None:
    encoder = Encoder(tiny_config).train()
    first, again, other = (encoder(packed, seed=torch.tensor(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sequences_by_themselves_drop_what_they_drop_in_the_stream(tiny_config: EncoderConfig, packed: Packed) -> None:
    encoder, first_rows = Encoder(tiny_config).train(), packed.cu_seqlens[:-1].tolist()
    parts = zip(alone(packed), first_rows, strict=True)
    got = torch.cat([encoder(part, seed=torch.tensor([3, first_row])) for part, first_row in parts])
    torch.testing.assert_close(got, encoder(packed, seed=torch.tensor(3)))


def test_without_a_seed_dropout_follows_torchs_generator(tiny_config: EncoderConfig, packed: Packed) -> None:
    encoder = Encoder(tiny_config).train()
    torch.manual_seed(5)
    first, second = encoder(packed), encoder(packed)
    torch.manual_seed(5)
    assert torch.equal(encoder(packed), first)
    assert not torch.equal(first, second)


def test_evaluation_is_deterministic_whatever_the_seed(tiny_config: EncoderConfig, packed: Packed) -> None:
    encoder = Encoder(tiny_config).eval()
    assert torch.equal(encoder(packed), encoder(packed, seed=torch.tensor(1)))


def test_dropout_keeps_the_share_it_should(tiny_config: EncoderConfig) -> None:
    p = 0.25
    encoder = Encoder(replace(tiny_config, hidden_dropout_prob=p)).train()
    embedded = encoder.embed(pack([[1] * 40] * 100), torch.tensor(0))
    elements = embedded.numel()
    dropped = int((embedded == 0).sum())
    assert abs(dropped - p * elements) < 5 * (elements * p * (1 - p)) ** 0.5


def test_every_dropout_has_a_site_of_its_own(
    tiny_config: EncoderConfig, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream_ids = []
    for name in ("embedding", "attention", "dropout_add_layer_norm"):
        op = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *args, op=op, **kw: (stream_ids.append(kw["stream_id"]), op(*args, **kw))[1]
        )
    encoder = Encoder(tiny_config).train()
    encoder(packed)
    assert stream_ids == list(range(encoder.dropout_stream_ids))


def test_initialisation_is_berts_and_follows_torchs_generator(tiny_config: EncoderConfig) -> None:
    config = replace(tiny_config, hidden_size=128, initializer_range=0.05)
    torch.manual_seed(1)
    first = Encoder(config, pooler=True)
    torch.manual_seed(1)
    second = Encoder(config, pooler=True)
    for (name, parameter), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 5000:
            assert abs(float(parameter.detach().std()) - 0.05) < 0.05 * 5 / (2 * parameter.numel()) ** 0.5 + 0.001, name
    assert not first.embeddings.word[config.pad_token_id].any()


def test_a_sequence_beyond_the_position_limit_is_refused(tiny_config: EncoderConfig) -> None:
    with pytest.raises(ValueError, match=r"a sequence of 41 tokens .* max_position_embeddings, 40; truncate it"):
        Encoder(tiny_config)(pack([[1], [1] * 41]))


@pytest.mark.parametrize("wrong", [-1, 50])
def test_ids_outside_their_table_are_refused(tiny_config: EncoderConfig, wrong: int) -> None:
    encoder = Encoder(tiny_config)
    with pytest.raises(
        ValueError, match=f"token id {wrong} is outside the encoder's table of 50; use the tokenizer of"
    ):
        encoder(pack([[1, wrong]]))
    with pytest.raises(
        ValueError, match=f"token type id {wrong % 7} is outside the encoder's table of 1; encode single"
    ):
        Encoder(replace(tiny_config, type_vocab_size=1))(pack([[1, 2]], [[0, wrong % 7]]))


@pytest.mark.parametrize("wrong", [-1, 50])
def test_ids_on_a_gpu_are_checked_by_what_was_packed(tiny_config: EncoderConfig, wrong: int) -> None:
    """The meta device has no numbers to read, as a GPU has none without waiting for it."""
    encoder, stream = Encoder(tiny_config), pack([[1, 2], [3]])
    encoder.check(stream.to("meta"))
    with pytest.raises(ValueError, match=f"token id {wrong} is outside the encoder's table of 50"):
        encoder.check(pack([[1, 2], [wrong]]).to("meta"))
    with pytest.raises(ValueError, match="token type id 2 is outside the encoder's table of 2"):
        encoder.check(pack([[1, 2]], [[0, 2]]).to("meta"))
    unknown = replace(pack([[wrong]]), id_ranges=None)
    encoder.check(unknown.to("meta"))
    with pytest.raises(ValueError, match=f"token id {wrong}"):
        encoder.check(unknown)


def test_compute_dtype_other_than_the_parameters_or_bfloat16_is_refused(tiny_config: EncoderConfig) -> None:
    encoder = Encoder(tiny_config)
    assert encoder.compute_dtype == torch.float32
    assert encoder.double().compute_dtype == torch.float64
    with pytest.raises(
        ValueError, match=r"compute_dtype must be torch.float64, .* or torch.bfloat16; got torch.float16"
    ):
        encoder.compute_dtype = torch.float16


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_whole_encoder_compiles_as_one_graph_forward_and_backward(tiny_config, packed, dynamic):
    encoder = Encoder(tiny_config).train()
    seed = torch.tensor(3)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for way in (encoder, compiled):
        encoder.zero_grad()
        hidden = way(packed, seed=seed)
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(param.grad for param in encoder.parameters())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)
