"""Several processes give the weights of one, whatever the recipe, and send as many bytes as the formula says."""

from __future__ import annotations

import pytest
import torch
from compare_runs import assert_close, assert_close_in_bf16, assert_equal_runs, state
from course import write_further_data
from groups import SMALL, once
from several_runs import train_all

from minbert import train
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.recipes import paper, papers
from minbert.reproduce import FILES
from minbert.runs.run_directory import Run

SIZES = (2, 3, 4)
THREE_STEPS = ("--steps=3", "--lr=1e-3")  # the rate at which roundings were measured
CASES = {
    "plain": "--recipe=plain",
    "smart-pcgrad": "",
    "smart-2-norm": "--smart.norm=2 --smart.per=sequence --smart.steps=2 --smart.masks=independent",
    "gse": "--recipe=gse",
    "bregman": "--recipe=pcgrad --bregman.mu=1 --bregman.beta=0.5",
    "accumulate": "--accumulate=2 --recipe=pcgrad",
    "low-memory": "--low-memory --recipe=pcgrad",
    "groups": "--recipe=pcgrad --surgery-groups=sst+qqp,sts",
    "by-layer": "--recipe=pcgrad --surgery-scope=layer",
    "by-module": "--recipe=gse --surgery-scope=module --shared-layer=linear",
    "weighting": "--recipe=plain --surgery=test_user_weighting:Unseeded",
    "one-task-a-step": "--recipe=plain --sampling=round-robin --optimizers=per-task",
    "batch-norm": "--recipe=pcgrad --shared-layer=transform --heads.sst=layers --heads.sts=concatenated-layers-cosine",
    "negatives": "--recipe=plain --heads.qqp=difference --losses.qqp=multiple_negatives_ranking",
    "r3f": "--recipe=r3f --surgery=pcgrad --smart.noise=uniform",
    "rdrop": "--recipe=rdrop --surgery=pcgrad --rdrop.alpha=0 --rdrop.alpha.sst=1 --rdrop.alpha.sts=2",
    "sift": "--recipe=sift --surgery=pcgrad",
    "vat": "--recipe=vat --smart.epsilon=2 --smart.sigma=2",
    "freelb": "--recipe=freelb --surgery=gse --smart.epsilon=2 --smart.eta=1 --accumulate=2 --bregman.mu=0.5",
    "freelb-by-task": '--recipe=freelb --smart.lambda-s={"sst":0.25,"qqp":0.5,"sts":1}',
    "norms": "--recipe=pcgrad --l2=0.1 --pooling=mean",
    "frozen": "--recipe=plain --mode=pretrain --pooling=pooler",
}
IN_BF16 = {f"bf16 {name}": f"{case} --precision=bf16 --steps=1" for name, case in CASES.items()}
# Steps of a length at which weights that the passes read in bf16 must follow those that are updated.
IN_BF16["bf16 far"] = "--recipe=pcgrad --precision=bf16 --steps=3 --lr=0.05"


@pytest.fixture(scope="module")
def runs(shared):
    """`runs(size)`: the directory with a run of every case by so many processes."""
    directory, options = shared
    cases = {name: [*options, *THREE_STEPS, *case.split()] for name, case in (CASES | IN_BF16).items()}
    return lambda size: once(directory / str(size), lambda out: train_all(cases, size, out))


def assert_same(one: Run, several: Run) -> None:
    """The same weights, moments, losses and scores."""
    assert_close(one.path, several.path)
    for mine, theirs in zip(one.metrics.records(), several.metrics.records(), strict=True):
        if "loss" in mine:
            for what in ("loss", "smart", "rdrop", "cosine"):
                assert theirs.get(what, {}) == pytest.approx(mine.get(what, {}), rel=1e-5, abs=1e-6)
            for what in ("grad_norm", "perturbation"):
                assert theirs.get(what, 0) == pytest.approx(mine.get(what, 0), rel=1e-5)
    for name, value in one.summary()["dev"].items():
        assert several.summary()["dev"][name] == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_several_processes_give_the_weights_of_one(case, size, runs):
    assert_same(Run(runs(1) / case), Run(runs(size) / case))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", IN_BF16)
def test_several_processes_give_the_gradients_of_one_in_bf16(case, size, runs):
    assert_close_in_bf16(runs(1) / case, runs(size) / case)


@pytest.mark.slow
def test_the_bound_in_bf16_shows_a_task_left_out_and_a_wrong_scale(shared, runs, tmp_path):
    options = [*shared[1], *IN_BF16["bf16 plain"].split()]
    for name, weights in (("without sst", "{sst: 1e-9}"), ("halved", "{sst: 0.5, qqp: 0.5, sts: 0.5}")):
        assert train.main([*options, f"--loss-weights={weights}", f"--out={tmp_path / name}"]) == 0
        with pytest.raises(AssertionError):
            assert_close_in_bf16(runs(1) / "bf16 plain", tmp_path / name)


@pytest.mark.slow
def test_a_resumed_run_of_several_processes_has_the_bits_of_one_that_was_not_stopped(shared, tmp_path):
    options = [*shared[1], "--schedule=constant", "--warmup=0", "--lr=1e-3"]
    cases = {name: [*options, *CASES[name].split()] for name in ("smart-pcgrad", "bregman", "freelb", "batch-norm")}
    cases["bf16 bregman"] = [*options, *CASES["bregman"].split(), "--precision=bf16"]
    train_all({name: [*case, "--steps=4"] for name, case in cases.items()}, 2, tmp_path / "whole")
    train_all({name: [*case, "--steps=2"] for name, case in cases.items()}, 2, tmp_path / "stopped")
    again = {str(tmp_path / "stopped" / name): [*case, "--steps=4", "--resume"] for name, case in cases.items()}
    train_all(again, 2, tmp_path / "resumed")
    for name in cases:
        assert_equal_runs(tmp_path / "whole" / name, tmp_path / "stopped" / name)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_what_nccl_is_given_gives_the_weights_of_one_process(size, shared, runs, tmp_path):
    in_fp32, in_bf16 = ("smart-pcgrad", "gse", "bregman"), ("bf16 gse", "bf16 far")
    cases = {name: [*shared[1], *THREE_STEPS, *(CASES | IN_BF16)[name].split()] for name in (*in_fp32, *in_bf16)}
    train_all(cases, size, tmp_path / "runs", "cpu", "nccl")
    for name in in_fp32:
        assert_same(Run(runs(1) / name), Run(tmp_path / "runs" / name))
    for name in in_bf16:
        assert_close_in_bf16(runs(1) / name, tmp_path / "runs" / name)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_weights_of_one(shared, tmp_path):
    cases = {name: [*shared[1], *THREE_STEPS, "--precision=fp32", *case.split()] for name, case in CASES.items()}
    for size in (1, 2):
        train_all(cases, size, tmp_path / str(size), "cuda")
    for name in cases:
        assert_close(tmp_path / "1" / name, tmp_path / "2" / name, within=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", papers())
def test_two_processes_give_the_weights_of_one_with_every_row_of_a_paper(number, shared, tmp_path):
    _, options = shared
    files = {name: f"--{FILES[name]}={path}" for name, path in write_further_data(tmp_path).items()}
    cases = {
        name: [*options, "--steps=2", f"--recipe={number}/{name}", *(files[need] for need in row.needs)]
        for name, row in paper(number).rows.items()
    }
    for size in (1, 2):
        train_all(cases, size, tmp_path / str(size))
    for name in cases:
        assert_same(Run(tmp_path / "1" / name), Run(tmp_path / "2" / name))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("case", "rows", "gathers", "passes"), [("plain", 1, 1, 1), ("smart-pcgrad", 3, 1, 3), ("bregman", 3, 2, 2)]
)
def test_a_rank_sends_the_bytes_that_the_formula_says(case, rows, gathers, passes, size, runs):
    def elements(kind: str) -> int:  # parameters begin at multiples of 16 elements, and so do the ranks' parts
        weights = [tensor.numel() for name, tensor in state(runs(1) / case).items() if name.startswith(f"{kind}.")]
        return up(sum(up(n, 16) for n in weights), 16 * size)

    def up(n: int, to: int) -> int:
        return -(-n // to) * to

    parameters = 4 * ((rows + gathers) * elements("model") + (1 + gathers) * elements("heads"))
    words, width = state(runs(1) / case)["model.embeddings.word_embeddings.weight"].shape
    most, least = parameters + rows * words * 8, parameters - 4 * rows * (words * width + 16 * size)
    pooled = 4 * passes * 3 * SMALL["batch_size"] * SMALL["scratch"]["hidden_size"]
    for record in Run(runs(size) / case).metrics.records():
        if "loss" in record:
            sent = record["bytes_sent"] * size / (size - 1)
            # a rank with fewer sequences than another sends as many vectors; sums of a few numbers come on top
            # and of the words' gradients between no row and, with their numbers, all of them
            assert least + pooled <= sent <= most + 1.5 * pooled


def test_one_process_is_a_group_of_its_own():
    group = ProcessGroup()
    assert group.is_main
    assert group.broadcast_object("word") == "word"
    assert group.all_gather_object(1) == [1]
    assert group.all_reduce_max(3) == 3
    assert torch.equal(group.all_reduce_sum(torch.ones(2)), torch.ones(2))
    assert group.bytes_sent == 0


@pytest.mark.parametrize("size", ["2", "x"])
def test_processes_that_nobody_started_are_one_line(size, monkeypatch, quick):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=f"the {size} processes cannot join: .*RANK expected"):
        train.main(quick)
