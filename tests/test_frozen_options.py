"""The options of every command, with their defaults: scripts and recorded runs rely on them.

An option that is new, renamed or has another default changes this table, and a line of CHANGELOG.md says so.
"""

from __future__ import annotations

import dataclasses

import pytest

from minbert import augment, describe_tasks, doctor, evaluate, predict, push, replay, reproduce
from minbert.cli import options_of
from minbert.config import TrainConfig
from minbert.export.__main__ import ExportConfig
from minbert.report.__main__ import ReportConfig

REQUIRED = "required"
OPTIONS = {
    TrainConfig: {
        "data": None,
        "tasks_file": None,
        "tasks": None,
        "model": None,
        "recipe": None,
        "out": None,
        "resume": False,
        "epochs": 3,
        "steps": None,
        "patience": None,
        "folds": None,
        "fold": None,
        "batch_size": 32,
        "lr": None,
        "head_lr": None,
        "layer_decay": 1.0,
        "seed": 0,
        "precision": "auto",
        "device": "auto",
        "backend": "auto",
        "matmul": "auto",
        "threads": None,
        "mode": "finetune",
        "freeze_layers": 0,
        "surgery": "pcgrad",
        "surgery_reduction": "sum",
        "surgery_scope": "model",
        "surgery_groups": None,
        "low_memory": False,
        "split_master_weights": False,
        "accumulate": 1,
        "timeout": 600.0,
        "cuda_graphs": True,
        "smart.lambda_s": 0.0,
        "smart.epsilon": 0.02,
        "smart.sigma": 0.01,
        "smart.eta": 0.02,
        "smart.steps": 1,
        "smart.norm": "inf",
        "smart.per": "token",
        "smart.projection": "ball",
        "smart.relative": True,
        "smart.masks": "shared",
        "smart.warmup": 0.0,
        "smart.precision": "auto",
        "smart.noise": "normal",
        "smart.normalized": False,
        "smart.search": "ascent",
        "smart.objective": "divergence",
        "rdrop.alpha": 0.0,
        "bregman.mu": 0.0,
        "bregman.beta": 0.99,
        "loss_weights": None,
        "optimizers": "shared",
        "sampling": "joint",
        "sampling_alpha": 1.0,
        "sampling_alpha_end": None,
        "sampling_weights": None,
        "epoch_length": "smallest",
        "epoch_times": 1,
        "swap_pairs": None,
        "augmented": None,
        "reviews": None,
        "reviews_per_star": 500,
        "strict": False,
        "heads": {},
        "losses": {},
        "l2": 0.0,
        "label_smoothing": 0.0,
        "shared_layer": None,
        "pooling": "cls",
        "max_length": None,
        "dropout": None,
        "head_dropout": 0.1,
        "schedule": "linear",
        "warmup": 0.1,
        "weight_decay": 0.01,
        "adam_eps": 1e-08,
        "clip_norm": 1.0,
        "max_skipped": 10,
        "checkpoint_steps": 200,
        "log_steps": 10,
        "log_to": None,
        "tensorboard": False,
        "scratch.vocab_size": 8000,
        "scratch.hidden_size": 128,
        "scratch.num_hidden_layers": 2,
        "scratch.num_attention_heads": 4,
        "scratch.intermediate_size": 512,
    },
    evaluate.EvaluateConfig: {
        "run": REQUIRED,
        "data": None,
        "tasks_file": None,
        "split": "dev",
        "tasks": None,
        "checkpoint": "best",
        "device": "auto",
        "strict": False,
    },
    predict.PredictConfig: {
        "run": REQUIRED,
        "task": REQUIRED,
        "input": REQUIRED,
        "output": None,
        "skipped": None,
        "strict": False,
        "checkpoint": "best",
        "device": "auto",
    },
    ExportConfig: {
        "run": REQUIRED,
        "to": REQUIRED,
        "out": REQUIRED,
        "task": None,
        "checkpoint": "best",
        "data": None,
        "tasks_file": None,
        "int8": False,
    },
    push.PushConfig: {
        "run": REQUIRED,
        "name": REQUIRED,
        "private": False,
        "checkpoint": "best",
        "message": "Upload with minbert push",
        "license": None,
        "seeds_of": None,
        "data": None,
        "tasks_file": None,
        "dry_run": False,
        "out": None,
    },
    describe_tasks.TasksConfig: {
        "file": REQUIRED,
        "tasks": None,
        "model": None,
        "max_length": 512,
    },
    doctor.DoctorConfig: {
        "check": False,
        "device": "auto",
        "json": False,
    },
    replay.ReplayConfig: {
        "directory": REQUIRED,
    },
    ReportConfig: {
        "run": REQUIRED,
        "data": None,
        "tasks_file": None,
    },
    augment.AugmentConfig: {
        "model": REQUIRED,
        "out": REQUIRED,
        "back_model": None,
        "data": None,
        "tasks_file": None,
        "task": "sst",
        "batch_size": 32,
        "beams": 4,
        "temperature": None,
        "max_length": 256,
        "seed": 0,
        "device": "auto",
        "strict": False,
    },
    reproduce.ReproduceConfig: {
        "paper": REQUIRED,
        "rows": None,
        "seeds": None,
        "data": None,
        "model": None,
        "protocol": None,
        "options": None,
        "epochs": None,
        "steps": None,
        "reviews": None,
        "augmented": None,
        "out": None,
        "table": None,
        "jobs": 1,
        "delete_checkpoints": False,
    },
}


@pytest.mark.parametrize("config", OPTIONS, ids=lambda config: config.__name__)
def test_the_options_of_a_command_and_their_defaults(config):
    found = {}
    for name, option in options_of(config):
        if not dataclasses.is_dataclass(option.type):
            found[name] = REQUIRED if option.required else option.default
    assert found == OPTIONS[config]


@pytest.mark.parametrize("config", OPTIONS, ids=lambda config: config.__name__)
def test_help_explains_every_option(config):
    assert all(option.text for _, option in options_of(config))
