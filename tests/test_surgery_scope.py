"""--surgery-scope: the parts of a model, each with a Gram matrix, orders and weights of its own."""

from __future__ import annotations

import pytest
import small_trainer
import torch
from compare_runs import assert_equal, interrupted, weights
from torch import Tensor

from minbert import train
from minbert.config import TrainConfig
from minbert.distributed.unsharded_parameters import UnshardedParameters
from minbert.errors import UserError
from minbert.methods.surgery import find_surgery
from minbert.methods.user_weighting import UserWeighting
from minbert.methods.weightings import weighting_from
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.model.parts import parts_of
from minbert.runs.run_directory import Run
from minbert.seeds import derive_seed
from minbert.training.loop import training_step

HERE = __name__
BY_LAYER = ["--surgery-scope=layer"]
ALIKE = [*BY_LAYER, "--smart.lambda-s=0", "--dropout=0", "--head-dropout=0"]


def model(*, pooler: bool = False, shared_layer: str | None = None, freeze: int = 0) -> MultitaskModel:
    config = EncoderConfig(**small_trainer.SIZES, max_position_embeddings=64)
    made = MultitaskModel(Encoder(config, pooler=pooler), small_trainer.TASKS, shared_layer=shared_layer)
    made.freeze_layers(freeze)
    return made


def inverse_norms(gram: Tensor) -> Tensor:
    return 1 / (1 + gram.diagonal().sqrt())


def ones(gram: Tensor) -> Tensor:
    return gram.new_ones(len(gram))


def random(gram: Tensor) -> Tensor:
    return torch.rand(len(gram), dtype=gram.dtype)


class Counting:
    def __init__(self, keep: float = 0.5) -> None:
        self.keep, self.calls = keep, 0

    def __call__(self, gram: Tensor) -> Tensor:
        self.calls += 1
        return gram.new_full((len(gram),), self.keep)


class Keeping(Counting):
    """Has attributes, which stay as they are."""

    def __call__(self, gram: Tensor) -> Tensor:
        return gram.new_full((len(gram),), self.keep)


# Parts ------------------------------------------------------------------------------------------------------------


def test_the_parts_hold_each_trained_parameter_of_the_trunk_once():
    whole = model(pooler=True, shared_layer="transform")
    trunk = list(whole.trunk.parameters())
    for scope in ("layer", "module"):
        parts = parts_of(whole, scope)
        assert set(parts.numbers) == set(trunk)
        assert sorted(set(parts.numbers.values())) == list(range(len(parts.names)))
    assert parts_of(whole, "layer").names == ("embeddings", "layers.0", "layers.1", "pooler", "shared")
    assert parts_of(whole, "model") is None


def test_a_module_is_a_part_if_it_has_parameters_of_its_own():
    whole = model()
    parts = parts_of(whole, "module")
    owners = {name for name, module in whole.encoder.named_modules() if module._parameters}
    assert set(parts.names) == owners
    for name, module in whole.encoder.named_modules():
        for param in module.parameters(recurse=False):
            assert parts.names[parts.numbers[param]] == name


def test_what_is_frozen_is_in_no_part():
    assert parts_of(model(freeze=1), "layer").names == ("layers.1",)
    assert parts_of(model(freeze=2), "layer") is None
    frozen = model(shared_layer="linear")
    frozen.freeze_encoder()
    assert parts_of(frozen, "layer").names == ("shared",)


# A step -----------------------------------------------------------------------------------------------------------


def trainer_of(scope: str, surgery: str = "pcgrad", **options):
    made = small_trainer.trainer(surgery, weight=0.0, dropout=0.0, **options)
    made.parts = parts_of(made.model, scope)
    return made


def plain_pcgrad(rows: list[list[Tensor]], generator: torch.Generator) -> list[Tensor]:
    """Yu et al. 2020, algorithm 1, on the gradients themselves: those of T tasks for some tensors, in float64."""
    vectors = [torch.cat([grad.flatten() for grad in row]) for row in rows]
    total = torch.zeros_like(vectors[0])
    for task, own in enumerate(vectors):
        projected = own.clone()
        for other in torch.randperm(len(rows), generator=generator).tolist():
            product = projected @ vectors[other]
            if other != task and product < 0:
                projected -= product / (vectors[other] @ vectors[other]) * vectors[other]
        total += projected
    sizes = [grad.numel() for grad in rows[0]]
    return [piece.view(grad.shape) for piece, grad in zip(total.split(sizes), rows[0], strict=True)]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("freeze", [0, 1])
@pytest.mark.parametrize("scope", ["layer", "module"])
def test_a_step_is_pcgrad_of_each_part_and_clipping_of_all(scope: str, freeze: int, sparse: bool, monkeypatch) -> None:
    trainer, seen = trainer_of(scope, freeze=freeze, sparse=sparse), []
    combined_step = trainer.optimizer.combined_step

    def recorded(shared, *arguments, **options):
        columns = dict(zip(shared.columns.params, zip(*shared.rows, strict=True), strict=True))
        copies = {param: [grad.to_dense().double() for grad in grads] for param, grads in columns.items()}
        seen.append((copies, [param.grad.double() for param in trainer.model.heads.parameters()]))
        return combined_step(shared, *arguments, **options)

    monkeypatch.setattr(trainer.optimizer, "combined_step", recorded)
    result = training_step(trainer, 0, 0.0).result()

    ((shared, own),) = seen
    generator = torch.Generator().manual_seed(derive_seed(0, "surgery", 0, 0))
    expected: dict[Tensor, Tensor] = {}
    for part in range(len(trainer.parts.names)):
        params = [param for param in shared if trainer.parts.numbers[param] == part]
        rows = [[shared[param][task] for param in params] for task in range(3)]
        expected |= dict(zip(params, plain_pcgrad(rows, generator), strict=True))
    expected |= dict(zip(trainer.model.heads.parameters(), own, strict=True))
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert norm > trainer.clip_norm
    for param, grad in expected.items():
        mean = 10 * trainer.optimizer.state[param]["exp_avg"].double()  # 1 - beta1 of the clipped gradient
        torch.testing.assert_close(mean, grad * (trainer.clip_norm / norm), rtol=1e-5, atol=1e-7)
    whole = torch.stack([torch.cat([shared[param][task].flatten() for param in shared]) for task in range(3)])
    cosine = whole[0] @ whole[1] / (whole[0].norm() * whole[1].norm())
    assert result.conflicts["cosine"]["sst/qqp"] == pytest.approx(cosine.item(), rel=1e-5)


def updated(trainer) -> list[Tensor]:
    for step in range(2):
        training_step(trainer, step, 0.0).result()
    return [param.detach() for param in trainer.model.parameters()]


def test_weights_that_are_the_same_for_every_part_give_the_update_of_the_whole_model() -> None:
    expected = updated(trainer_of("model", f"{HERE}:ones"))
    for scope in ("layer", "module"):
        found = updated(trainer_of(scope, f"{HERE}:ones"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # the norm is another sum
    assert not torch.equal(updated(trainer_of("layer"))[0], updated(trainer_of("model"))[0])


def test_a_step_that_is_not_finite_in_one_part_changes_nothing() -> None:
    trainer = trainer_of("layer", "gradvac")
    (surgery,) = trainer.surgeries
    surgery.prepare(3, small_trainer.CPU, len(trainer.parts.names))
    before = [param.detach().clone() for param in trainer.model.parameters()]
    leaf = trainer.gradients.leaves[-1]

    def spoil(leaf: Tensor) -> None:
        leaf.grad.fill_(float("inf"))

    leaf.register_post_accumulate_grad_hook(spoil)
    assert not training_step(trainer, 0, 0.0).result().updated
    assert all(torch.equal(param, old) for param, old in zip(trainer.model.parameters(), before, strict=True))
    assert not surgery.weighting.state.any()


@pytest.mark.parametrize("name", ["upgrad", "cagrad", "nash-mtl", "famo", "constant(values=(1, 2, 0.5))"])
def test_each_part_has_the_weights_of_a_rule_and_a_state_of_its_own(name: str) -> None:
    rows = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grams, losses, zero = rows @ rows.mT, torch.rand(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def weights_of(grams: Tensor, parts: int | None, generator: torch.Generator) -> Tensor:
        (surgery,) = find_surgery(name)
        surgery.prepare(3, small_trainer.CPU, parts)
        for _ in range(2):
            weights = surgery.weights(grams, generator, zero, 0.0, losses=losses)[0]
        return weights

    together = weights_of(grams, 4, torch.Generator().manual_seed(0))
    for part, gram in enumerate(grams):
        assert torch.equal(together[part], weights_of(gram, None, torch.Generator()))


def test_one_process_updates_the_parameters_themselves() -> None:
    parts = parts_of(model(), "layer")
    assert UnshardedParameters(torch.nn.ModuleDict()).by_shard(parts.numbers) is parts.numbers


# User weightings --------------------------------------------------------------------------------------------------


def of_parts(name: str, grams: Tensor) -> Tensor:
    return UserWeighting(f"{HERE}:{name}")(grams, torch.Generator().manual_seed(3))


def test_a_users_weighting_is_called_for_each_part() -> None:
    grams = torch.stack([torch.eye(2, dtype=torch.float64) * scale for scale in (1.0, 4.0, 9.0)])
    assert torch.equal(of_parts("inverse_norms", grams), torch.stack([inverse_norms(gram) for gram in grams]))
    assert of_parts("Keeping", grams).tolist() == [[0.5, 0.5]] * 3
    drawn = of_parts("random", grams)
    assert torch.equal(drawn, of_parts("random", grams))
    assert len(drawn.unique()) == 6


def test_a_users_weighting_with_a_state_is_refused_for_several_parts() -> None:
    grams = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    with pytest.raises(UserError) as error:
        of_parts("Counting", grams)
    assert str(error.value) == (
        f"--surgery {HERE}:Counting keeps a state from call to call, which the parts of --surgery-scope would share;"
        " leave --surgery-scope out"
    )
    assert of_parts("Counting", grams[:1]).tolist() == [[0.5, 0.5]]


# What holds of the whole model -------------------------------------------------------------------------------------


def gradient_along(grams: Tensor, weights: Tensor) -> Tensor:
    """The inner product of each task's whole gradient with an update of these weights [G, T]."""
    return (grams @ weights[..., None]).sum((0, 2))


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda"])
def test_what_conflicts_in_no_part_conflicts_nowhere(name: str) -> None:
    rows = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grams = rows @ rows.mT
    weights = weighting_from(name).weights(grams)
    assert (gradient_along(grams, weights) >= -1e-3 * grams.diagonal(dim1=1, dim2=2).max()).all()


@pytest.mark.parametrize("name", ["pcgrad", "mgda"])
def test_parts_may_have_no_common_descent_where_the_whole_model_has(name: str) -> None:
    """The example of docs/surgery.md: two parameters, and the gradients (2, -1) and (-1, 2)."""
    parts = torch.tensor([[[2.0], [-1.0]], [[-1.0], [2.0]]], dtype=torch.float64)
    grams = parts @ parts.mT
    (surgery,) = find_surgery(name)
    zero, generator = torch.zeros((), dtype=torch.float64), torch.Generator().manual_seed(0)
    of_model, _ = surgery.weights(grams.sum(0), generator, zero, 0.0)
    of_parts, _ = surgery.weights(grams, generator, zero, 0.0)
    assert (grams.sum(0) @ of_model > 0.1).all()
    torch.testing.assert_close(gradient_along(grams, of_parts), torch.zeros(2, dtype=torch.float64))


# Runs -------------------------------------------------------------------------------------------------------------


def test_a_scope_that_does_nothing_is_refused() -> None:
    for surgery in ("sum", "mean"):
        with pytest.raises(UserError) as error:
            TrainConfig(surgery=surgery, surgery_scope="layer")
        assert str(error.value) == (
            f"--surgery-scope layer does nothing with --surgery {surgery}, whose weights are the same for every part;"
            " leave it out, or give another --surgery"
        )


def test_a_run_says_its_parts(quick, capsys) -> None:
    assert train.main([*quick, *BY_LAYER, "--steps=1", "--freeze-layers=0"]) == 0
    assert "surgery pcgrad of 2 parts by layer (embeddings, layers.0);" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("more", [["--low-memory"], ["--batch-size=4", "--accumulate=2"]])
def test_other_streams_train_like_one(quick, tmp_path, more) -> None:
    for name, options in (("one", []), ("other", more), ("start", ["--steps=1", "--lr=1e-12"])):
        assert train.main([*quick, *ALIKE, "--steps=6", *options, f"--out={tmp_path / name}"]) == 0
    one, other, start = (weights(tmp_path / name) for name in ("one", "other", "start"))
    for name in one:
        if not name.endswith("key.bias"):  # its gradient is 0, whose noise AdamW enlarges
            far = (other[name] - start[name]).abs().max()
            assert (one[name] - other[name]).abs().max() <= 0.01 * far + 1e-6, name


@pytest.mark.parametrize(
    "options",
    [
        ["--recipe=smart-gse", *BY_LAYER],
        ["--surgery-scope=module", "--surgery-groups=qqp+sts,sst", "--shared-layer=linear", "--freeze-layers=1"],
        ["--recipe=smart-gse", *BY_LAYER, "--accumulate=2", "--batch-size=4", "--low-memory"],
        *(["--surgery-scope=module", f"--surgery={rule}"] for rule in ("gradvac", "famo", "random")),
    ],
)
def test_a_run_is_resumed_to_the_bit(quick, tmp_path, options) -> None:
    straight = tmp_path / "straight"
    assert train.main([*quick, *options, f"--out={straight}"]) == 0
    with interrupted("minbert.training.loop.training_step", 6):
        train.main([*quick, *options])
    assert train.main([*quick, *options, "--resume"]) == 0
    assert_equal(weights(straight), weights(tmp_path / "run"))
    assert f"--surgery-scope={Run(straight).config().surgery_scope}" in options
