"""Training on a GPU is the training of the CPU: the same losses and scores, resumed to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare_runs import assert_equal, interrupted, weights
from rich.console import Console

from minbert import cli, train
from minbert.config import TrainConfig
from minbert.device import resolve_device
from minbert.distributed.process_group import ProcessGroup
from minbert.runs.run_directory import Run
from minbert.training import loop

pytestmark = pytest.mark.gpu


@pytest.mark.slow
def test_the_demo_corpus_is_learned_as_on_the_cpu(cuda, tmp_path):
    scores, options = {}, ["--precision=fp32", "--epochs=2", "--log-steps=1"]
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        assert train.main([f"--out={out}", f"--device={device}", *options]) == 0
        losses = [sum(record["loss"].values()) for record in Run(out).metrics.records() if "loss" in record]
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
        scores[device] = Run(out).summary()["dev"]["overall"]
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_fall_and_memory_is_reported(cuda, tmp_path, precision):
    out = tmp_path / "run"
    options = [f"--out={out}", "--device=cuda", f"--precision={precision}", "--steps=30", "--log-steps=1"]
    assert train.main(options) == 0
    losses = [sum(record["loss"].values()) for record in Run(out).metrics.records() if "loss" in record]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    found = Run(out).summary()
    assert found["precision"] == precision
    assert found["device"].startswith(torch.cuda.get_device_name())
    assert 2**20 < found["peak_memory_bytes"] < 2**30
    compiled = {op for op, backend in found["backends"].items() if backend != "reference"}
    assert {"attention", "dropout_add_layer_norm", "bias_gelu", "embedding", "gram", "combine_adamw_"} <= compiled


@pytest.mark.parametrize("options", [["--recipe=plain"], ["--recipe=smart-pcgrad"]])
def test_one_step_is_that_of_the_cpu(cuda, quick, tmp_path, options):
    """In float32, with dropout and noise on: both come from the same random words."""
    found = {}
    for device in ("cpu", "cuda"):
        # CUDA graphs pad the stream, and dropout follows the place in it
        arguments = [*quick, *options, "--precision=fp32", f"--device={device}", "--dropout=0.1", "--cuda-graphs=false"]
        config = cli.parse_layers("train", TrainConfig, arguments)
        group = ProcessGroup(device=resolve_device(device))
        trainer = loop.start(config, Run(tmp_path / device), Console(quiet=True), group).trainer
        trainer.model.train()
        start = torch.cat([param.detach().cpu().flatten() for param in trainer.model.parameters()])
        result = loop.training_step(trainer, 0, 0.0).result()
        end = torch.cat([param.detach().cpu().flatten() for param in trainer.model.parameters()])
        found[device] = result, end - start
    (by_cpu, cpu_change), (by_gpu, gpu_change) = found["cpu"], found["cuda"]
    assert by_gpu.loss == pytest.approx(by_cpu.loss, rel=1e-4)
    assert by_gpu.grad_norm == pytest.approx(by_cpu.grad_norm, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(cpu_change, gpu_change, dim=0) > 0.99
    assert gpu_change.norm().item() == pytest.approx(cpu_change.norm().item(), rel=1e-2)


def test_an_interrupted_run_resumes_to_the_bit(cuda, quick, tmp_path):
    options = [*quick, "--device=cuda", "--precision=bf16", "--recipe=smart-pcgrad", "--dropout=0.1"]
    assert train.main([*options, f"--out={tmp_path / 'straight'}"]) == 0
    with interrupted("minbert.training.loop.training_step", 6):
        train.main(options)
    assert train.main([*options, "--resume"]) == 0
    assert_equal(weights(tmp_path / "straight"), weights(tmp_path / "run"))
