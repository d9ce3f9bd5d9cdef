"""R3F, SiFT, virtual adversarial training and R-Drop against their papers' equations in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from plain_regularisers import (
    COUNTS,
    FREELB,
    LAMBDAS,
    R3F,
    SIFT,
    VAT,
    Outputs,
    assert_same,
    divergence,
    embedding_block,
    function,
    gradients,
    lengths_of,
    normalised,
    seeds,
    small_batch,
    small_model,
    task_losses,
    trained,
    weighted,
)
from torch import Tensor

from minbert import kernels
from minbert.config import TrainConfig
from minbert.data.packing import Packed
from minbert.errors import UserError
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import SmartConfig, embedding_scale, rounds_away, start
from minbert.model import MultitaskModel
from minbert.recipes import recipe


@pytest.fixture
def model() -> MultitaskModel:
    return small_model()


@pytest.fixture
def packed() -> Packed:
    return small_batch()


# R3F -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_r3f_is_the_divergence_under_noise_without_a_search(model, packed, noise, monkeypatch):
    monkeypatch.setattr(kernels, "smart_ascend", lambda *a, **k: pytest.fail("a step of ascent"))
    config = replace(R3F, noise=noise, epsilon=0.0, eta=0.0)  # neither plays a part
    losses, found = trained(model, packed, config)
    f, x = function(model, packed), model.embed(packed, seeds(packed)[0])
    z = start(x.detach(), packed.cu_seqlens, config, seeds(packed)[2], embedding_scale(model)) - x.detach()
    clean = f(x)
    terms = divergence(f(x + z), clean)
    torch.testing.assert_close(losses.smart, terms, rtol=1e-9, atol=0)
    assert_same(found, gradients(model, sum(task_losses(clean).values()) + weighted(terms, LAMBDAS)))


@pytest.mark.parametrize("noise", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_has_its_distribution(noise, dtype):
    x, config = torch.zeros(400, 32, dtype=dtype), SmartConfig(steps=0, sigma=0.5, noise=noise)
    cu_seqlens, scale = torch.tensor([0, 400], dtype=torch.int32), torch.tensor(2.0)
    z = start(x, cu_seqlens, config, torch.tensor(3), scale).double().flatten().sort().values
    assert z.dtype == torch.float64
    ranks = torch.arange(1, len(z) + 1) / len(z)
    expected = torch.special.ndtr(z) if noise == "normal" else (z + 1) / 2  # sigma times the scale is 1
    assert (ranks - expected).abs().max() < 1.95 / math.sqrt(len(z))  # Kolmogorov and Smirnov: once in a thousand
    if noise == "uniform":
        assert z.abs().max() <= 1


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_r3f_without_noise_adds_0(model, packed, noise):
    plain, wanted = trained(model, packed)
    losses, found = trained(model, packed, replace(R3F, sigma=0.0, noise=noise))
    assert all(value == 0 for value in losses.smart.values())
    assert losses.total == plain.total
    assert_same(found, wanted)


# Virtual adversarial training ----------------------------------------------------------------------------------------


def test_vat_is_the_power_iteration_of_its_paper(model, packed, monkeypatch):
    losses, found = trained(model, packed, VAT)
    f, x, scale = function(model, packed), model.embed(packed, seeds(packed)[0]), embedding_scale(model)
    clean, point = f(x), x.detach()
    constant = {name: output.detach() for name, output in clean.items()}
    noise = kernels.smart_init(torch.zeros_like(point), sigma=1.0, seed=seeds(packed)[2], stream_id=0)
    d = noise / lengths_of(noise, packed)
    for _ in range(VAT.steps):
        r = (VAT.sigma * scale * d).requires_grad_()
        (g,) = torch.autograd.grad(sum(divergence(constant, f(point + r), symmetric=False).values()), r)
        d = g / lengths_of(g, packed)
    terms = divergence(constant, f(x + VAT.epsilon * scale * d), symmetric=False)
    torch.testing.assert_close(losses.smart, terms, rtol=1e-6, atol=0)
    wanted = gradients(model, sum(task_losses(clean).values()) + weighted(terms, LAMBDAS))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("steps", [1, 3])
def test_vats_perturbation_has_the_length_epsilon(model, packed, per, steps, monkeypatch):
    config = replace(VAT, per=per, steps=steps)
    moved, from_embedded = [], model.from_embedded
    monkeypatch.setattr(
        model, "from_embedded", lambda x, *a, **k: moved.append(x.detach()) or from_embedded(x, *a, **k)
    )
    trained(model, packed, config)
    clean, *searched, last = moved
    assert len(searched) == steps
    for point, length in [*((point, config.sigma) for point in searched), (last, config.epsilon)]:
        offset = point - clean
        norms = offset.norm(dim=1) if per == "token" else lengths_of(offset, packed)
        torch.testing.assert_close(norms, torch.full_like(norms, length * embedding_scale(model)), rtol=1e-6, atol=0)


def test_vats_clean_side_is_constant(model, packed):
    """The gradient of one task's divergence with respect to its head's bias is that of the perturbed pass alone."""
    _, plain = trained(model, packed)
    _, one_sided = trained(model, packed, VAT)
    _, two_sided = trained(model, packed, replace(VAT, objective="divergence"))
    name = "heads.sts.bias"
    assert not torch.allclose(one_sided[name], plain[name])
    torch.testing.assert_close(two_sided[name], plain[name])  # of a squared distance the two sides cancel here


# SiFT ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective_of", ["divergence", "kl"])
def test_sift_is_smart_before_the_affine_part(model, packed, objective_of):
    """The search and every gradient, LayerNorm's weight among them, with autograd through the whole composition."""
    config = replace(SIFT, objective=objective_of)
    losses, found = trained(model, packed, config)
    f, n = function(model, packed), normalised(model, packed)
    clean = f(embedding_block(model, packed, n))
    constant = {name: output.detach() for name, output in clean.items()}
    r = kernels.smart_init(torch.zeros_like(n), sigma=config.sigma, seed=seeds(packed)[2], stream_id=0)

    def raised(r: Tensor, clean: Outputs) -> Outputs:
        moved = f(embedding_block(model, packed, n + r))
        return divergence(clean, moved, symmetric=config.objective == "divergence")

    for _ in range(config.steps):
        r = r.detach().requires_grad_()
        (g,) = torch.autograd.grad(sum(raised(r, constant).values()), r)
        g = g / g.abs().amax(1, keepdim=True)
        r = (r.detach() + config.eta * g).clamp(-config.epsilon, config.epsilon)
    terms = raised(r, clean if config.objective == "divergence" else constant)
    torch.testing.assert_close(losses.smart, terms, rtol=1e-7, atol=0)
    assert_same(found, gradients(model, sum(task_losses(clean).values()) + weighted(terms, LAMBDAS)))


def test_sift_is_smart_where_the_affine_part_is_the_identity(model, packed):
    model.encoder.embeddings.dropout_p = 0.0
    torch.nn.init.ones_(model.encoder.embeddings.norm.weight)
    torch.nn.init.zeros_(model.encoder.embeddings.norm.bias)
    smart, wanted = trained(model, packed, replace(SIFT, normalized=False))
    sift, found = trained(model, packed, SIFT)
    torch.testing.assert_close(sift.smart, smart.smart)
    torch.testing.assert_close(sift.perturbation, smart.perturbation)
    weight = "encoder.embeddings.norm.weight"  # SMART's perturbation is constant, and SiFT's is g r
    assert not torch.allclose(found.pop(weight), wanted.pop(weight))
    assert_same(found, wanted)


def test_scaled_embeddings_change_nothing_of_sift(model, packed):
    """What the paper is after: the perturbation is measured before the embeddings get their scale."""
    found = []
    for scale in (1.0, 3.0):
        with torch.no_grad():
            model.encoder.embeddings.word *= scale
            model.encoder.embeddings.position *= scale
            model.encoder.embeddings.token_type *= scale
        found.append(trained(model, packed, SIFT)[0].smart)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


# R-Drop --------------------------------------------------------------------------------------------------------------


def test_rdrop_is_the_mean_of_two_losses_and_a_quarter_of_alpha_of_both_divergences(model, packed):
    alpha = {"sst": 2.0, "qqp": 1.0}
    losses, found = trained(model, packed, rdrop=RDropConfig(alpha))
    one, other = (model(packed, COUNTS, seed=seed) for seed in seeds(packed)[:2])
    plain = task_losses(one)
    means = {name: (plain[name] + loss) / 2 for name, loss in task_losses(other).items()}
    terms = divergence(one, other)
    total = means["sst"] + means["qqp"] + plain["sts"] + 2.0 / 4 * terms["sst"] + 1.0 / 4 * terms["qqp"]
    torch.testing.assert_close(losses.rdrop, {name: terms[name] for name in alpha})
    assert losses.rdrop["sst"] > 1e-3
    torch.testing.assert_close(losses.task, {**means, "sts": plain["sts"]})
    torch.testing.assert_close(losses.total, total)
    assert_same(found, gradients(model, total))


def test_rdrop_without_dropout_adds_0_and_doubles_nothing(model, packed):
    model.eval()
    plain, wanted = trained(model, packed)
    losses, found = trained(model, packed, rdrop=RDropConfig(3.0))
    assert all(value == 0 for value in losses.rdrop.values())
    assert losses.total == plain.total
    assert_same(found, wanted)


def test_rdrop_and_smart_each_add_theirs(model, packed):
    smart = SmartConfig(lambda_s=2.0, epsilon=0.1, eta=0.1)
    (alone, _), (dropped, _) = trained(model, packed, smart), trained(model, packed, rdrop=RDropConfig(1.0))
    losses, _ = trained(model, packed, smart, RDropConfig(1.0))
    torch.testing.assert_close((losses.smart, losses.rdrop), (alone.smart, dropped.rdrop))
    torch.testing.assert_close(losses.total, dropped.total + 2 * sum(alone.smart.values()))


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "title"),
    [(R3F, "R3F"), (SIFT, "SiFT"), (VAT, "virtual adversarial training"), (FREELB, "FreeLB"), (SmartConfig(), "SMART")],
)
def test_each_is_called_by_its_name(config, title):
    assert config.title == title


@pytest.mark.parametrize("name", ["r3f", "rdrop", "sift", "vat", "freelb"])
def test_a_recipe_is_the_method_that_it_is_named_after(name):
    options = recipe(name)
    assert options["surgery"] == "sum"
    if name == "rdrop":
        assert RDropConfig(**options["rdrop"]).on
        return
    config = SmartConfig(**options["smart"])
    assert config.on
    titles = {"r3f": "R3F", "sift": "SiFT", "vat": "virtual adversarial training", "freelb": "FreeLB"}
    assert config.title == titles[name]


def test_only_the_lengths_that_play_a_part_raise_the_precision(model):
    model = model.float()
    small = {"lambda_s": 1.0, "relative": True}
    assert rounds_away(model, SmartConfig(**small, epsilon=1e-5), torch.bfloat16) == "epsilon"
    assert rounds_away(model, SmartConfig(**small, epsilon=1e-5, steps=0, sigma=0.1), torch.bfloat16) is None
    assert rounds_away(model, SmartConfig(**small, steps=0, sigma=1e-5), torch.bfloat16) == "sigma"
    short = SmartConfig(**small, epsilon=1.0, sigma=1e-5, eta=0.0)
    assert rounds_away(model, replace(short, projection="unit"), torch.bfloat16) == "sigma"
    assert rounds_away(model, replace(short, projection="unit", eta=0.1), torch.bfloat16) is None
    assert rounds_away(model, short, torch.bfloat16) is None
    power = {"search": "power", "norm": "2", "epsilon": 1.0}
    assert rounds_away(model, SmartConfig(**small, **power, sigma=1e-3), torch.bfloat16) == "sigma"
    assert rounds_away(model, SmartConfig(**small, **power, sigma=1.0), torch.bfloat16) is None
    assert rounds_away(model, replace(FREELB, epsilon=1e-6), torch.bfloat16) == "epsilon"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmartConfig(steps=-1), r"--smart.steps must be 0 or more, got -1"),
        (lambda: SmartConfig(steps=0, search="power"), r"--smart.search power with --smart.steps 0 searches nothing"),
        (lambda: SmartConfig(steps=0, objective="task-loss"), r"--smart.objective task-loss with --smart.steps 0"),
        (lambda: SmartConfig(search="power", sigma=0.0), r"--smart.search power starts from noise of length"),
        (lambda: replace(FREELB, lambda_s=2.0), r"--smart.lambda-s must be at most 1 with --smart.objective task-loss"),
        (lambda: RDropConfig(-1.0), r"--rdrop.alpha must be 0 or more, got -1"),
        (lambda: RDropConfig({"sst": math.inf}), r"--rdrop.alpha must be 0 or more, got inf"),
        (lambda: TrainConfig(rdrop=RDropConfig({"sts2": 1.0})), r"--rdrop.alpha: unknown task 'sts2'"),
        (lambda: TrainConfig(rdrop=RDropConfig(1.0), smart=FREELB, dropout=0.1), r"in place of a task's; leave one of"),
        (lambda: TrainConfig(rdrop=RDropConfig(1.0), head_dropout=0.0), r"nothing is dropped; give --dropout 0.1"),
        (lambda: TrainConfig(smart=FREELB, split_master_weights=True), r"--smart.objective task-loss leaves none"),
    ],
)
def test_what_makes_no_sense_is_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
