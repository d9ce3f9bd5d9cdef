"""SMARTLoss: inside the ball, uphill, and without a trace in the parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from minbert.integrations import SMARTLoss, inf_norm, l2_norm, sym_kl_loss

NORMS = {"inf": inf_norm, "2": l2_norm}
LENGTHS = [5, 2, 7]
MASK = torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]
CU_SEQLENS = torch.tensor([0, 5, 7, 14], dtype=torch.int32)
D = 6


class Network(nn.Module):
    """Tokens, averaged over those of their sequence, to logits; it remembers every embedding it was given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(D, 16, dtype=dtype), nn.Linear(16, 3, dtype=dtype)
        self.seen: list[Tensor] = []

    def forward(self, embed: Tensor) -> Tensor:
        self.seen.append(embed.detach())
        return self.head(torch.tanh(self.layer(embed)).mean(-2))


def embeddings(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def norms(offset: Tensor, norm: str, per: str) -> Tensor:
    """One norm per real token or sequence of a padded offset, in float64."""
    packed = offset.double()[MASK]
    groups = packed.unbind(0) if per == "token" else packed.split(LENGTHS)
    return torch.stack([torch.linalg.vector_norm(group, math.inf if norm == "inf" else 2) for group in groups])


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_perturbation_lies_in_the_ball_after_every_step(dtype, norm: str, per: str) -> None:
    network, embed = Network(dtype), embeddings(dtype)
    options = {"norm_fn": NORMS[norm], "num_steps": 3, "step_size": 0.2, "epsilon": 0.1, "per": per}
    options["noise_var"] = 0.02  # bfloat16 rounds the default's away, where there is no slope
    SMARTLoss(network, sym_kl_loss, **options)(embed, network(embed), mask=MASK)
    assert len(network.seen) == 1 + 3 + 1  # clean, one for every slope, the last
    for perturbed in network.seen[2:]:
        rounding = norms(2 * torch.finfo(dtype).eps * embed.abs(), norm, per)
        lengths = norms(perturbed - embed, norm, per)
        assert (lengths <= 0.1 + rounding).all()
        assert (lengths > 0.05).all()


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_released_behaviour_is_a_perturbation_of_norm_1(norm: str, per: str) -> None:
    network, embed = Network(), embeddings()
    smart = SMARTLoss(network, sym_kl_loss, norm_fn=NORMS[norm], num_steps=2, projection="unit", per=per)
    smart(embed, network(embed), mask=MASK)
    for perturbed in network.seen[2:]:
        lengths = norms(perturbed - embed, norm, per)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-5, atol=0)


def test_the_released_step_is_not_scaled() -> None:
    """Noise plus step_size times the gradient as it comes, in the direction of which the perturbation then lies."""
    network, embed = Network(torch.float64), embeddings(torch.float64)
    smart = SMARTLoss(network, sym_kl_loss, noise_var=1e-2, step_size=3.0, projection="unit")
    smart(embed, network(embed))
    noisy = network.seen[1].requires_grad_()
    (slope,) = torch.autograd.grad(sym_kl_loss(network(noisy), network(embed).detach()), noisy)
    step = noisy.detach() - embed + 3.0 * slope
    torch.testing.assert_close(network.seen[2] - embed, step / inf_norm(step))


@pytest.mark.parametrize("norm", NORMS)
def test_for_a_linear_function_the_climb_ends_at_the_maximum_of_the_ball(norm: str) -> None:
    """Of (w x~ - w x)^2 it is epsilon squared times the squared dual norm of w; with the infinity norm the ascent
    direction g / |g|_inf leads there at once only for a w of one magnitude."""
    w = torch.tensor([1.0, -1.0, -1.0, 1.0]) if norm == "inf" else torch.tensor([1.0, -2.0, 3.0, 0.5])
    embed = torch.randn(1, 4, dtype=torch.float64)
    loss = SMARTLoss(
        lambda x: x @ w.double(), nn.MSELoss(), norm_fn=NORMS[norm], epsilon=0.1, step_size=1e4, noise_var=1e-6
    )(embed, embed @ w.double())
    dual = w.abs().sum() if norm == "inf" else w.norm()
    assert loss.item() == pytest.approx((0.1 * dual.item()) ** 2, rel=1e-5)


def test_climbing_beats_noise_of_the_same_norm() -> None:
    network, embed = Network(), embeddings()
    state = network(embed)
    for seed in range(5):
        torch.manual_seed(seed)
        options = {"epsilon": 0.1, "noise_var": 1e-4, "projection": "unit"}
        noise = SMARTLoss(network, sym_kl_loss, step_size=0.0, **options)(embed, state)
        climbed = SMARTLoss(network, sym_kl_loss, step_size=1e4, **options)(embed, state)
        assert climbed > noise


def test_more_steps_climb_higher() -> None:
    network, embed = Network(), embeddings()
    losses = []
    for steps in (0, 1, 4, 16):
        generator = torch.Generator().manual_seed(0)
        smart = SMARTLoss(
            network, sym_kl_loss, num_steps=steps, step_size=0.02, epsilon=0.1, noise_var=1e-8, generator=generator
        )
        losses.append(smart(embed, network(embed)).item())
    assert losses == sorted(losses)
    assert losses[-1] > 10 * losses[1]


def test_the_gradient_is_that_of_the_returned_loss_alone() -> None:
    """Through the clean output, the perturbed one and the embeddings, with the perturbation as a constant."""
    network = Network(torch.float64)
    embed = embeddings(torch.float64).requires_grad_()
    smart = SMARTLoss(network, nn.MSELoss(), sym_kl_loss, num_steps=2, step_size=0.1, epsilon=0.1)
    loss = smart(embed, network(embed))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert embed.grad is None
    loss.backward()
    wrt = [*network.parameters(), embed]
    offset = network.seen[-1] - embed.detach()
    expected = torch.autograd.grad(sym_kl_loss(network(embed + offset), network(embed)), wrt)
    for tensor, gradient in zip(wrt, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_noise_var_is_a_variance() -> None:
    embed = torch.zeros(400, 100)
    seen = []
    SMARTLoss(lambda x: seen.append(x) or x, nn.MSELoss(), num_steps=0, noise_var=0.25)(embed, embed)
    spread = 5 * 0.25 * math.sqrt(2 / embed.numel())
    assert seen[0].square().mean().item() == pytest.approx(0.25, abs=spread)


@pytest.mark.parametrize("projection", ["ball", "unit"])
def test_padding_is_not_perturbed(projection: str) -> None:
    network, embed = Network(), embeddings()
    embed[~MASK] = math.nan  # nor read
    smart = SMARTLoss(lambda x: network(x.where(MASK[..., None], 0)), sym_kl_loss, epsilon=0.1, projection=projection)
    loss = smart(embed, network(embed.where(MASK[..., None], 0)), mask=MASK)
    assert loss.isfinite()
    for perturbed in network.seen[1:]:
        assert torch.equal(perturbed[~MASK], torch.zeros_like(perturbed[~MASK]))
        assert (perturbed[MASK] != embed[MASK]).any(1).all()


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("projection", ["ball", "unit"])
def test_padded_and_packed_embeddings_are_perturbed_alike(projection: str, per: str) -> None:
    embed, results = embeddings(), []
    w = torch.randn(D)
    for x, places in ((embed, {"mask": MASK.long()}), (embed[MASK], {"cu_seqlens": CU_SEQLENS})):
        seen: list[Tensor] = []
        evaluate = lambda e, seen=seen: seen.append(e.detach()) or torch.tanh(e) @ w  # noqa: E731
        generator = torch.Generator().manual_seed(3)
        options = {"epsilon": 0.1, "noise_var": 1e-3, "projection": projection, "per": per, "generator": generator}
        loss_fn = lambda a, b: (a - b).square().sum()  # noqa: E731
        SMARTLoss(evaluate, loss_fn, **options)(x, torch.tanh(x) @ w, **places)
        results.append(seen[-1])
    torch.testing.assert_close(results[0][MASK], results[1], rtol=0, atol=1e-6)


def test_a_sequence_of_padding_only_is_left_alone() -> None:
    network, embed, mask = Network(), embeddings(), MASK.clone()
    mask[1] = False
    smart = SMARTLoss(network, sym_kl_loss, epsilon=0.1, per="sequence")
    smart(embed, network(embed), mask=mask)
    assert torch.equal(network.seen[-1][1], embed[1])
    assert not torch.equal(network.seen[-1][2], embed[2])


def test_the_generator_gives_the_noise() -> None:
    network, embed = Network(), embeddings()
    state = network(embed)

    def draw(seed: int) -> float:
        return SMARTLoss(network, sym_kl_loss, generator=torch.Generator().manual_seed(seed), num_steps=0)(
            embed, state
        ).item()

    assert draw(1) == draw(1) != draw(2)
    values = []
    for _ in range(2):
        torch.manual_seed(9)
        values.append(SMARTLoss(network, sym_kl_loss)(embed, state).item())
    assert values[0] == values[1]


def test_the_readme_of_smart_pytorch_runs_and_its_default_epsilon_moves_nothing() -> None:
    network, embed = Network(), embeddings()
    inf = lambda x: torch.norm(x, p=float("inf"), dim=-1, keepdim=True)  # noqa: E731
    smart = SMARTLoss(network, sym_kl_loss, None, inf, 1, 1e-3, 1e-6, 1e-5)
    assert smart.norm == "inf"
    loss = smart(embed, network(embed))
    assert loss.requires_grad
    assert abs(loss.item()) < 1e-6
    assert SMARTLoss(network, sym_kl_loss, epsilon=0.1, step_size=0.1)(embed, network(embed)) > 1e-4
    assert isinstance(smart, nn.Module)
    assert set(smart.parameters()) == set(network.parameters())


def test_it_measures_under_no_grad() -> None:
    network, embed = Network(), embeddings()
    with torch.no_grad():
        loss = SMARTLoss(network, sym_kl_loss, epsilon=0.1, step_size=0.1)(embed, network(embed))
    assert loss > 1e-4
    assert not loss.requires_grad


def test_the_native_ops_run(native_ops: list[str]) -> None:
    network, embed = Network(), embeddings()
    SMARTLoss(network, sym_kl_loss, num_steps=2)(embed, network(embed))
    assert native_ops == ["smart_init", "smart_ascend", "smart_ascend"]


def test_messages_of_construction() -> None:
    network = Network()
    for options, error, message in [
        ({"loss_fn": [sym_kl_loss]}, TypeError, "loss_fn must be a function, got list"),
        ({"num_steps": -1}, ValueError, "num_steps must be a whole number, 0 or more, got -1"),
        ({"num_steps": 1.5}, ValueError, "num_steps must be a whole number, 0 or more, got 1.5"),
        ({"epsilon": -1e-6}, ValueError, "epsilon must be finite and at least 0, got -1e-06"),
        ({"noise_var": math.nan}, ValueError, "noise_var must be finite and at least 0, got nan"),
        ({"projection": "sphere"}, ValueError, "projection must be one of 'ball', 'unit', got 'sphere'"),
        ({"generator": 1}, TypeError, r"generator must be a torch\.Generator or None, got int"),
        ({"per": "batch"}, ValueError, "per must be one of 'token', 'sequence', got 'batch'"),
        (
            {"norm_fn": lambda x: x.norm(dim=-1)},
            ValueError,
            r"keep it, .*; got \[5\.0, 1\.0\]; use inf_norm",
        ),
        ({"norm_fn": lambda x: x.norm(1, -1, True)}, ValueError, r"got \[\[7\.0\], \[1\.0\]\]; use inf_norm"),
    ]:
        with pytest.raises(error, match=message):
            SMARTLoss(**{"eval_fn": network, "loss_fn": sym_kl_loss, **options})


def test_messages_of_calls() -> None:
    network, embed = Network(), embeddings()
    state = network(embed).detach()
    good = {"eval_fn": network, "loss_fn": sym_kl_loss}
    ids = torch.ones(3, 7, dtype=torch.long)

    def without_gradients(x: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x)

    for options, call, error, message in [
        ({}, (ids, state), ValueError, r"\[N, D\], got torch\.int64 \[3, 7\]; give the embeddings of the tokens, not"),
        ({}, (embed, (state, state)), TypeError, r"state must be a tensor, eval_fn\(embed\), got tuple"),
        (
            {},
            (embed, state, MASK[:, :3]),
            ValueError,
            r"mask must be \[batch, tokens\] .* got \[3, 3\] for \[3, 7,",
        ),
        ({}, (embed, state, MASK.tolist()), TypeError, r"mask must be a tensor \[batch, tokens\], got list"),
        ({}, (embed, state, MASK & False), ValueError, "mask must hold a real token, got none"),
        ({}, (embed, state, None, CU_SEQLENS), ValueError, "cu_seqlens is for packed .*; give padded ones a mask"),
        ({"per": "sequence"}, (embed[0], state[0]), ValueError, r"needs cu_seqlens, int32 \[S \+ 1\], for packed"),
        ({"eval_fn": lambda x: network(embed)}, (embed, state), ValueError, "must depend on the embeddings"),
        ({"eval_fn": without_gradients}, (embed, state), ValueError, "and outside torch.no_grad"),
        ({"loss_fn": nn.MSELoss(reduction="none")}, (embed, state), ValueError, r"scalar tensor, got shape \[3, 3\]"),
    ]:
        x, y, mask, cu_seqlens = (*call, None, None)[:4]
        with pytest.raises(error, match=message):
            SMARTLoss(**{**good, **options})(x, y, mask=mask, cu_seqlens=cu_seqlens)
