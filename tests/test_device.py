"""Which device a run gets; GPUs that are too old for the kernels are refused, or the CPU takes their place."""

from __future__ import annotations

import pytest
import torch
from fake_gpus import forget, pretend

from minbert import device, kernels
from minbert.errors import UserError
from minbert.kernels import dispatch

OLD = "minbert needs a GPU of compute capability 8.0 or newer, and Tesla T4 has 7.5"


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of the given compute capability."""
    yield lambda *capability: pretend(monkeypatch, capability)
    forget()


def test_auto_takes_the_cpu_in_place_of_a_gpu_that_is_too_old_and_says_so_once(gpu, capsys):
    gpu(7, 5)
    for _ in range(2):
        assert device.resolve_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == f"warning: the CPU is used: {OLD}\n"


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_too_old_is_refused_by_name(gpu, name):
    gpu(7, 5)
    with pytest.raises(UserError) as raised:
        device.resolve_device(name)
    assert str(raised.value) == f"--device {name}: {OLD}; use --device cpu"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_newer_gpus_are_taken(gpu, capability, capsys):
    gpu(*capability)
    assert device.resolve_device("auto") == torch.device("cuda")
    assert device.resolve_device("cuda:0") == torch.device("cuda:0")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_of_a_machine_take_the_cpu_where_one_has_a_gpu_that_is_too_old(rank, monkeypatch, gpu, capsys):
    pretend(monkeypatch, (9, 0), (7, 5))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device.resolve_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == ("" if rank else f"warning: the CPU is used: {OLD}\n")
    if rank:
        with pytest.raises(UserError) as raised:
            device.resolve_device("cuda")
        assert str(raised.value) == f"--device cuda:1: {OLD}; use --device cpu"
    else:
        assert device.resolve_device("cuda") == torch.device("cuda:0")


def test_bf16_is_not_chosen_where_a_gpu_only_emulates_it(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    gpu(7, 5)
    assert device.resolve_precision("auto", torch.device("cuda")) == "fp32"
    gpu(8, 0)
    assert device.resolve_precision("auto", torch.device("cuda")) == "bf16"


def test_a_gpu_that_is_not_there_is_refused(gpu):
    gpu(9, 0)
    with pytest.raises(UserError, match=r"--device cuda:1: torch .* sees 1 CUDA devices"):
        device.resolve_device("cuda:1")


def test_the_ops_of_a_gpu_that_is_too_old_run_the_reference(gpu, monkeypatch):
    gpu(7, 5)
    monkeypatch.setattr(dispatch.native, "cuda_available", lambda: True)
    monkeypatch.setattr(dispatch.triton, "available", lambda: True)
    choices = kernels.backends("cuda", explain=True)
    assert {choice.runs for choice in choices.values()} == {"reference"}
    assert choices["attention"].not_available["triton"] == [OLD.removeprefix("minbert ")]
