"""--freeze-layers and --layer-decay: what stays as it is, what that saves, and how fast the other layers learn."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from small_trainer import SIZES, trainer
from torch.utils._python_dispatch import TorchDispatchMode

from minbert.config import ScratchConfig, TrainConfig
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.tasks import find_tasks
from minbert.training.loop import training_step
from minbert.training.setup import build_data, build_model, build_optimizer

LAYERS = 2  # of the small trainer's encoder
METHODS = [
    {"surgery": "sum", "weight": 0.0},
    {"surgery": "pcgrad"},
    {"surgery": "gse", "mu": 0.5},
    {"low_memory": True},
    {"dtype": torch.bfloat16, "copied": True},
]


class Calls(TorchDispatchMode):
    """Counts ops by name; as "added" products that are added to the gradient of a weight's view."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("minbert::")
        self.counts[name] += 1
        self.counts["added"] += name == "aten::addmm.out"
        return func(*args, **(kwargs or {}))


def products(layers: int) -> int:
    """Of so many layers from the top: the last one computes its queries by themselves."""
    return 4 * layers + (layers > 0)


def calls(**options) -> Counter[str]:
    steps = trainer(**options)
    with Calls() as counted:
        training_step(steps, 0, 0.0).result()
    counted.counts["weights"], rest = divmod(counted.counts["added"], len(steps.gradients.rows))
    assert rest == 0  # each weight has a view for each task
    return counted.counts


@pytest.mark.parametrize("frozen", [1, 2])
@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
def test_no_backward_goes_through_what_is_frozen(surgery, frozen):
    found = calls(surgery=surgery, weight=0.0, freeze=frozen)
    trained = LAYERS - frozen
    assert found["linear_backward"] == found["weights"] == products(trained)
    assert found["attention_backward"] == max(trained - 1, 0)
    assert found["first_token_attention_backward"] == (trained > 0)
    assert found["embedding_backward"] == 0
    assert calls(surgery=surgery, weight=0.0)["embedding_backward"] == 1


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_smart_goes_through_frozen_layers_in_its_search_alone(frozen):
    found = calls(freeze=frozen)
    trained = LAYERS - frozen
    assert found["weights"] == 2 * products(trained)  # of the clean pass and the perturbed one
    assert found["linear_backward"] == products(LAYERS) + 2 * products(trained)
    assert found["embedding_backward"] == (frozen == 0)


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("frozen", [1, 2])
def test_frozen_parameters_stay_and_all_others_move(options, frozen):
    steps = trainer(freeze=frozen, **options)
    before = {name: param.clone() for name, param in steps.model.named_parameters()}
    for step in range(2):
        assert training_step(steps, step, step / 2).result().updated
    kept = tuple(["encoder.embeddings.", *(f"encoder.layers.{i}." for i in range(frozen))])
    for name, param in steps.model.named_parameters():
        assert torch.equal(param, before[name]) == name.startswith(kept), name
    states = {param for param in steps.optimizer.state if steps.optimizer.state[param]}
    assert not states & {param for name, param in steps.model.named_parameters() if name.startswith(kept)}


@pytest.mark.parametrize("options", METHODS)
def test_freezing_leaves_the_gradients_of_what_is_trained(options):
    """To the bit: dropout acts in frozen layers as in training."""
    one, other = trainer(**options), trainer(freeze=1, **options)
    for steps in (one, other):
        for update in steps.surgeries[1:]:
            steps.surgeries.remove(update)
        steps.clip_norm = 0.0  # the norm is of all that is trained
        training_step(steps, 0, 0.5).result()
    gradients = [
        dict(zip(map(id, of.gradients.params), zip(*of.gradients.rows, strict=True), strict=True))
        for of in (one, other)
    ]
    trained = 0
    theirs = dict(one.model.named_parameters())
    for name, param in other.model.named_parameters():
        if id(param) in gradients[1]:
            trained += 1
            for mine, expected in zip(gradients[1][id(param)], gradients[0][id(theirs[name])], strict=True):
                assert torch.equal(mine, expected), name
    assert trained == 12  # of the one layer that is trained
    for param, expected in zip(other.model.heads.parameters(), one.model.heads.parameters(), strict=True):
        assert torch.equal(param.grad, expected.grad)


def test_dropout_acts_in_frozen_layers():
    model = trainer(freeze=2, dropout=0.5).model
    assert all(module.training for module in model.encoder.modules())


# Options -------------------------------------------------------------------------------------------------------------

SCRATCH = ScratchConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
)


def config_of(**options) -> TrainConfig:
    return TrainConfig(**{"precision": "fp32", "scratch": SCRATCH, "lr": 1e-3, "tasks": ["sts"], **options})


def test_more_layers_than_there_are_are_refused(course_data):
    data = build_data(config_of(data=str(course_data)))
    build_model(config_of(freeze_layers=3), data)
    with pytest.raises(UserError, match="--freeze-layers 4: the encoder has 3 layers; give at most 3"):
        build_model(config_of(freeze_layers=4), data)


def test_a_task_that_has_nothing_to_train_is_refused(course_data):
    config = config_of(data=str(course_data), heads={"sts": "cosine"})
    data = build_data(config)
    build_model(config.replace(freeze_layers=2), data)
    with pytest.raises(UserError, match="--freeze-layers 3 leaves nothing to train for sts: its head cosine has no"):
        build_model(config.replace(freeze_layers=3), data)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze_layers": -1}, "--freeze-layers must be 0 or more, got -1"),
        ({"layer_decay": 0.0}, "--layer-decay must be more than 0 and at most 1, got 0"),
        ({"layer_decay": 1.5}, "--layer-decay must be more than 0 and at most 1, got 1.5"),
        ({"freeze_layers": 2, "mode": "pretrain"}, "--freeze-layers 2: --mode pretrain trains no layer"),
        ({"layer_decay": 0.9, "mode": "pretrain"}, "--layer-decay 0.9: --mode pretrain trains no layer"),
    ],
)
def test_values_that_do_not_fit_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        TrainConfig(**options)


# Layer-wise decay of the learning rate -------------------------------------------------------------------------------


def rates(**options) -> dict[str, float]:
    """By parameter, its learning rate."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**{**SIZES, "num_hidden_layers": 3}), pooler=True)
    model = MultitaskModel(encoder, find_tasks(["sst", "sts"]), shared_layer="linear").train()
    config = config_of(**options)
    model.freeze_layers(config.freeze_layers)
    optimizer, _ = build_optimizer(config, model, 1, ProcessGroup())
    found = {param: group["lr"] for group in optimizer.param_groups for param in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    return {name: found[param] for name, param in model.named_parameters() if param in found}


def test_each_layer_learns_more_slowly_than_the_one_above():
    found = rates(layer_decay=0.5, head_lr=0.01)
    expected = {"encoder.layers.2.": 1e-3, "encoder.layers.1.": 5e-4, "encoder.layers.0.": 2.5e-4}
    expected |= {"encoder.embeddings.": 1.25e-4, "encoder.pooler.": 1e-3, "heads.": 0.01, "shared.": 0.01}
    assert {prefix for name in found for prefix in expected if name.startswith(prefix)} == expected.keys()
    for name, rate in found.items():
        (prefix,) = [prefix for prefix in expected if name.startswith(prefix)]
        assert rate == pytest.approx(expected[prefix]), name


def test_without_decay_all_learn_alike_and_the_groups_are_as_before():
    assert {*rates().values()} == {1e-3}
    model = trainer().model
    assert [group["name"] for group in model.parameter_groups(0.01)] == [
        "encoder.decay",
        "encoder.no_decay",
        "heads.decay",
        "heads.no_decay",
    ]


def test_the_first_group_whose_rate_is_logged_has_the_full_rate():
    model = trainer().model
    names = [group["name"] for group in model.parameter_groups(0.01, by_layer=True)]
    assert names[0] == "encoder.1.decay"
    assert names[-4:] == ["encoder.embeddings.decay", "encoder.embeddings.no_decay", "heads.decay", "heads.no_decay"]


def test_what_is_frozen_has_no_rate():
    found = rates(layer_decay=0.5, freeze_layers=2)
    assert not any(name.startswith(("encoder.embeddings", "encoder.layers.0", "encoder.layers.1")) for name in found)
    assert any(name.startswith("encoder.layers.2") for name in found)


@pytest.mark.parametrize("by_layer", [False, True])
def test_weight_decay_does_not_depend_on_the_layers_groups(by_layer):
    model = trainer().model
    decays = {
        param: group["weight_decay"]
        for group in model.parameter_groups(0.01, by_layer=by_layer)
        for param in group["params"]
    }
    assert len(decays) == len(list(model.parameters()))
    assert all(decays[param] == (0.01 if param.ndim > 1 else 0.0) for param in model.parameters())


def test_the_teacher_and_smart_are_of_the_same_model(course_data):
    """An average of what is trained; the rest is the model's own."""
    config = config_of(
        data=str(course_data), freeze_layers=1, bregman=BregmanConfig(mu=1.0), smart=SmartConfig(lambda_s=1.0)
    )
    data = build_data(config)
    model = build_model(config, data)
    _, parameters = build_optimizer(config, model, 1, ProcessGroup())
    assert set(parameters.ema) == {param for param in model.parameters() if param.requires_grad}
