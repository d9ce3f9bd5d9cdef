"""The library of float32 products: decided once per run, the same for all ranks, written down, and kept."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace

import pytest
import torch

from minbert import evaluate, kernels, predict, train
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.model import EncoderConfig
from minbert.runs.run_directory import Run
from minbert.training.arithmetic import choose_matmul

libraries = importlib.import_module("minbert.kernels.matmul_library")  # its name in the package is the function's


@pytest.fixture(autouse=True)
def own_choice():
    """Restore the library after each test."""
    with kernels.use_matmul("blas"):
        yield


@pytest.fixture
def measured(monkeypatch):
    """The encoders that are measured; oneDNN wins."""
    sizes = []
    monkeypatch.setattr(kernels, "faster_matmul", lambda *size: sizes.append(size) or "onednn")
    return sizes


@pytest.fixture
def used(monkeypatch):
    """Which library was chosen at each product."""
    linear = importlib.import_module("minbert.kernels.linear")
    found, product = [], linear._product

    @functools.wraps(product)
    def noting(*tensors):
        found.append(kernels.matmul())
        return product(*tensors)

    monkeypatch.setattr(linear, "_product", noting)
    return found


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@needs_onednn
def test_a_run_measures_once_and_its_evaluation_and_continuation_keep_to_it(quick, tmp_path, measured, used, capsys):
    options = [*quick, "--precision=fp32"]
    assert train.main([*options, "--steps=3"]) == 0
    assert measured == [(16, 32)]
    assert {*used} == {"onednn"}
    assert kernels.matmul() == "blas"
    run = tmp_path / "run"
    assert Run(run).config().matmul == "onednn"
    assert Run(run).summary()["backends"]["linear"] == "oneDNN"
    assert "oneDNN: linear" in capsys.readouterr().out
    used.clear()
    assert train.main([*options, "--steps=6", "--resume"]) == 0
    assert evaluate.main([str(run)]) == 0
    kernels.set_matmul("blas")
    (tmp_path / "text").write_text("a fine film\n")
    assert predict.main([str(run), "--task=sst", f"--input={tmp_path / 'text'}"]) == 0
    assert {*used} == {"onednn"}
    assert measured == [(16, 32)]
    used.clear()
    capsys.readouterr()
    assert train.main([*options, "--steps=8", "--resume", "--matmul=blas"]) == 0
    assert "--matmul (was onednn, is blas): sums may round differently" in capsys.readouterr().out
    assert {*used} == {"blas"}


@pytest.mark.parametrize(
    ("options", "precision", "device"),
    [
        ({}, "bf16", "cpu"),
        ({}, "fp32", "meta"),
        ({"backend": "reference"}, "fp32", "cpu"),
        ({"matmul": "blas"}, "fp32", "cpu"),
    ],
)
def test_what_multiplies_no_float32_or_is_chosen_is_not_measured(options, precision, device, measured):
    group = SimpleNamespace(is_main=True, device=torch.device(device), broadcast_object=lambda name: name)
    assert choose_matmul(TrainConfig(**options, precision=precision), EncoderConfig(), group) == "blas"
    assert not measured


@needs_onednn
@pytest.mark.parametrize("is_main", [True, False])
def test_all_ranks_take_what_the_first_one_finds(is_main, measured):
    found = []

    def broadcast_object(name):
        found.append(name)
        return "onednn"

    group = SimpleNamespace(is_main=is_main, device=torch.device("cpu"), broadcast_object=broadcast_object)
    encoder = EncoderConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    assert choose_matmul(TrainConfig(precision="fp32"), encoder, group) == "onednn"
    assert kernels.matmul() == "onednn"
    assert measured == ([(384, 1536)] if is_main else [])
    assert found == ["onednn" if is_main else "blas"]


def test_a_library_that_torch_lacks_is_refused_for_training_and_named_for_predicting(
    quick, tmp_path, monkeypatch, capsys
):
    assert train.main([*quick, "--precision=fp32", "--steps=1"]) == 0
    run = tmp_path / "run"
    config = (run / "config.yaml").read_text()
    assert "matmul: blas\n" in config
    (run / "config.yaml").write_text(config.replace("matmul: blas", "matmul: onednn"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert evaluate.main([str(run)]) == 0
    assert "in their last digits" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match=r"^--matmul onednn: .*without oneDNN"):
        train.main([*quick, "--precision=fp32", f"--out={tmp_path / 'other'}", "--matmul=onednn"])
