"""Training with every rule of WEIGHTINGS: options, state in checkpoints, skipped steps, the losses that a rule sees."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from compare_runs import assert_close, assert_equal, interrupted, tensors
from groups import once
from several_runs import train_all
from small_trainer import CPU, TASKS, parts, trainer

from minbert import kernels, train
from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.kernels.gradient_table import GradientColumns, GradientTable
from minbert.kernels.weightings import MOST_TASKS
from minbert.methods.surgery import check_surgery, find_surgery
from minbert.methods.user_weighting import STATE
from minbert.methods.weightings import WEIGHTINGS
from minbert.report.training_charts import gradient_figures
from minbert.runs.run_directory import Run
from minbert.training.loop import training_step
from minbert.training.objective import Losses
from minbert.training.trainer import gradient_products

NAMES = [f"{name}(values=[1, 0.5, 2])" if name == "constant" else name for name in WEIGHTINGS]
STATEFUL = [name for name, rule in kernels.WEIGHTING_RULES.items() if rule.state_size(3)]
OFTEN = {"dwa": ["--surgery.every=1"]}  # so that a few steps are enough for other weights
SMALL = ("--steps=5", "--epoch-length=9", "--recipe=pcgrad", "--schedule=constant", "--warmup=0", "--lr=1e-3")


def options_of(name: str, *further: str) -> list[str]:
    return [*SMALL, f"--surgery={name}", *OFTEN.get(name, []), *further]


@pytest.fixture(autouse=True)
def unfinished():
    """Without scores, predictions and a report at the end of a run: its checkpoints are what is compared."""
    with patch("minbert.training.training_run.TrainingRun.finish"):
        yield


@pytest.fixture(scope="module")
def runs(shared):
    """`runs(size, scope)`: the directory with a run of every rule by so many processes."""

    def trained(size: int, scope: str = "model") -> Path:
        cases = {name: [*shared[1], *options_of(name, f"--surgery-scope={scope}")] for name in NAMES}
        return once(shared[0] / f"surgery-{scope}-{size}", lambda out: train_all(cases, size, out))

    return trained


@pytest.fixture
def run(shared, tmp_path):
    """`run(NAME, *OPTIONS)`: what `minbert train` made of a surgery, in a directory of its name."""

    def trained(name: str, *options: str, directory: str = "") -> Run:
        out = tmp_path / (directory or name)
        assert train.main([*shared[1], *options_of(name, *options), f"--out={out}"]) == 0
        return Run(out)

    return trained


def steps_of(run: Run) -> list[dict]:
    return [record for record in run.metrics.records() if "loss" in record]


# Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_trains_and_records_its_weights_and_its_state(name, runs):
    run = Run(runs(1) / name)
    steps = steps_of(run)
    assert (len(steps), run.summary()["skipped_steps"]) == (5, 0)
    assert all(step["weights"].keys() == {"sst", "qqp", "sts"} for step in steps)
    weights = [list(step["weights"].values()) for step in steps]
    assert all(math.isfinite(weight) for step in weights for weight in step)
    assert run.config().surgery.startswith(check_surgery(name).partition("(")[0])
    assert (run.last / STATE).exists() == (name in STATEFUL)
    if name.startswith("constant"):
        assert weights[2] == pytest.approx([1, 0.5, 2])
    else:
        assert weights[3] != pytest.approx(weights[4], rel=1e-9)
    (chart,) = [figure for figure in gradient_figures(steps, {})["Gradient surgery"] if figure.title == "Weights"]
    assert chart


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_weights_of_one(name, scope, runs):
    one, two = (Run(runs(size, scope) / name) for size in (1, 2))
    assert_close(one.path, two.path)
    for mine, theirs in zip(steps_of(one), steps_of(two), strict=True):
        assert theirs["weights"] == pytest.approx(mine["weights"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_rule_with_a_state_resumes_to_the_bit(name, runs, run):
    with interrupted("minbert.training.loop.training_step", 3):
        run(name, "--checkpoint-steps=1")
    resumed = run(name, "--checkpoint-steps=1", "--resume")
    files = ("model", "heads", "optimizer", STATE.removesuffix(".safetensors"))
    assert_equal(*(tensors(path, "last", *files) for path in (runs(1) / name, resumed.path)))


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_with_its_state(shared, runs, run, tmp_path):
    cases = {name: [*shared[1], *options_of(name), "--steps=3"] for name in STATEFUL}
    train_all(cases, 2, tmp_path / "two")
    for name in STATEFUL:
        path = tmp_path / "two" / name
        (surgery,) = find_surgery(Run(path).config().surgery)
        surgery.prepare(3, CPU)
        surgery.weighting.load(path / "last", CPU)
        assert torch.equal(surgery.weighting.state, tensors(path, "last", "surgery")["surgery.state"])
        assert surgery.weighting.state.any()
        run(name, "--resume", directory=f"two/{name}")
        assert_close(runs(1) / name, path)


def test_sum_and_mean_record_no_weights(run):
    for name in ("sum", "mean", "pcgrad", "gse"):
        (step,) = steps_of(run(name, "--steps=1"))
        assert ("weights" in step) == (name in ("pcgrad", "gse"))


def test_weights_are_those_before_clipping(run):
    (step,) = steps_of(run("constant(values=[1, 2, 3])", "--steps=1", "--clip-norm=1e-3"))
    assert step["grad_norm"] > 1e-3
    assert step["weights"] == pytest.approx({"sst": 1, "qqp": 2, "sts": 3})


def test_groups_have_a_weight_each_and_more_than_the_rules_take_are_one_line(run):
    step, _ = steps_of(run("famo", "--steps=2", "--surgery-groups=sst+qqp,sts"))
    assert step["weights"].keys() == {"sst+qqp", "sts"}
    (surgery,) = find_surgery("famo")
    with pytest.raises(UserError, match=f"--surgery famo.* takes at most {MOST_TASKS} gradients, and 17 .*groups"):
        surgery.prepare(17, CPU)


def test_one_task_trains_as_without_surgery(run):
    plain = run("sum", "--tasks=sst", "--steps=2")
    for name in ("upgrad", "mgda", "gradvac", "famo", "random"):
        assert_close(plain.path, run(name, "--tasks=sst", "--steps=2").path)


# A step -----------------------------------------------------------------------------------------------------------


class Seen:
    """A weighting of the user's that remembers the losses that it saw."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []

    def __call__(self, gram: torch.Tensor, *, losses: torch.Tensor) -> torch.Tensor:
        self.losses.append(losses.tolist())
        return gram.new_ones(len(gram))


def without_losses(gram: torch.Tensor, **others: object) -> torch.Tensor:
    assert not others
    return gram.new_ones(len(gram))


@pytest.mark.parametrize("low_memory", [False, True])
def test_losses_are_weighted_sums_of_groups_and_means_of_batches_without_regularisers(low_memory):
    steps = trainer(
        f"{__name__}:Seen",
        sample=lambda step: [parts(step=2 * step), parts(step=2 * step + 1)],
        low_memory=low_memory,
        mu=0.5,
        task_groups=[TASKS[:1], TASKS[1:]],
        weights={"qqp": 3.0},
    )
    result = training_step(steps, 0, 0.0).result()
    (seen,) = steps.surgeries[0].weighting.weighting.losses
    assert seen == pytest.approx([result.loss["sst"], 3 * result.loss["qqp"] + result.loss["sts"]])
    assert result.smart["sst"] > 0


def test_all_ranks_see_the_bits_of_rank_0s_losses():
    """Each computes them from the same numbers, which machines of several kinds may round differently."""
    losses, sent = torch.tensor([0.1, 0.7, 1 / 3], dtype=torch.float64), {}

    def seen_by(rank: int, own: torch.Tensor, others: torch.Tensor | float) -> torch.Tensor:
        group = ProcessGroup(rank, 2)

        def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
            sent[rank] = tensor.clone()
            return tensor + others

        group.all_reduce_sum = all_reduce_sum
        tables = [GradientTable(GradientColumns([torch.ones(4)], tasks), [torch.ones(4)] * tasks) for tasks in (3, 1)]
        streams = [Losses({}, {}, {}, {}, torch.ones(()), torch.zeros(()))]
        return gradient_products(*tables, streams, group, own).losses

    rounded = torch.nextafter(losses, torch.ones(()).double())
    seen_by(1, rounded, 0.0)
    assert torch.equal(seen_by(0, losses, sent[1]), losses)
    assert torch.equal(seen_by(1, rounded, sent[0]), losses)


def test_a_weighting_without_losses_in_its_signature_gets_none():
    assert not find_surgery(f"{__name__}:without_losses")[0].needs_losses
    assert training_step(trainer(f"{__name__}:without_losses"), 0, 0.0).result().updated


@pytest.mark.parametrize("where", ["head", "loss", "trunk"])
@pytest.mark.parametrize("name", [*STATEFUL, "seen"])
def test_a_skipped_step_leaves_the_state(name, where):
    """One that a non-finite gradient of a head alone skips, too: such a gradient is not in the Gram matrix."""
    steps = trainer(f"{__name__}:Seen" if name == "seen" else name)
    weighting = steps.surgeries[0].weighting

    def now() -> object:
        return [*weighting.weighting.losses] if name == "seen" else weighting.state.clone()

    training_step(steps, 0, 0.0).result()
    before = now()
    if where == "head":
        handle = next(steps.model.heads["sst"].parameters()).register_hook(lambda grad: grad * math.nan)
    elif where == "loss":
        handle = steps.model.heads["sst"].register_forward_hook(lambda module, given, outputs: outputs * math.inf)
    else:
        handle = steps.gradients.leaves[0].register_hook(lambda grad: grad * math.nan)
    assert not training_step(steps, 1, 0.0).result().updated
    after = now()
    assert after == before if name == "seen" else torch.equal(after, before)
    handle.remove()
    assert training_step(steps, 2, 0.0).result().updated
    after = now()
    assert after != before if name == "seen" else not torch.equal(after, before)


# Options ----------------------------------------------------------------------------------------------------------


def surgery_of(*words: str) -> str:
    return parse_layers("train", TrainConfig, words).surgery


def test_the_ways_to_give_an_option_are_one_surgery(tmp_path):
    (tmp_path / "mine.yaml").write_text("surgery: cagrad(c=0.3)\n")
    file = f"--config={tmp_path / 'mine.yaml'}"
    ways = [
        ["--surgery=cagrad(c=0.25)"],
        ["--surgery", "cagrad", "--surgery.c", "0.25"],
        ["--surgery.c=0.25", "--surgery=cagrad"],
        ["--surgery=cagrad( c = 0.5 )", "--surgery.c=0.25"],
        [file, "--surgery.c=25e-2"],
        [file, "--surgery=cagrad(c=0.25)"],
    ]
    assert {surgery_of(*words) for words in ways} == {"cagrad(c=0.25)"}
    assert surgery_of(file) == "cagrad(c=0.3)"
    assert surgery_of("--surgery=cagrad") == surgery_of("--surgery=cagrad(c=0.4)") == "cagrad(c=0.4)"
    assert surgery_of("--surgery=nash-mtl", "--surgery.max-norm=2") == surgery_of("--surgery=nash-mtl(max_norm=2)")
    of_mode = surgery_of("--surgery=aligned-mtl(mode='median')")
    assert surgery_of("--surgery=aligned-mtl", "--surgery.mode=median") == of_mode
    assert surgery_of("--surgery=constant", "--surgery.values=1,2") == surgery_of("--surgery=constant(values=[1, 2])")
    assert surgery_of("--surgery=a.b:C(1)", "--surgery.c=0.4") == "a.b:C(1, c=0.4)"


@pytest.mark.parametrize("name", NAMES)
def test_the_form_in_config_yaml_is_read_as_itself(name, tmp_path):
    config = TrainConfig(surgery=name)
    assert check_surgery(config.surgery) == config.surgery
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config == config.replace(seed=1).replace(seed=0)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--surgery=cagard"], ["--surgery cagard", "did you mean 'cagrad'", "upgrad", "MODULE:NAME"]),
        (["--surgery=cagard(c=1)"], ["did you mean 'cagrad'"]),
        (["--surgery=cagrad(d=0.4)"], ["cagrad", "no option d", "expected c"]),
        (["--surgery=cagrad", "--surgery.temperature=1"], ["cagrad has no option temperature"]),
        (["--surgery=gradnorm", "--surgery.aplha=1"], ["gradnorm", "did you mean 'alpha'"]),
        (["--surgery=cagrad(c=-1)"], ["c", "-1"]),
        (["--surgery=cagrad(c=inf)"], ["cagrad(c=inf)"]),
        (["--surgery=cagrad", "--surgery.c=much"], ["c", "much"]),
        (["--surgery=cagrad(c=0.4"], ["cagrad(c=0.4"]),
        (["--surgery=cagrad(0.4)(1)"], ["cagrad(0.4)(1)"]),
        (["--surgery=cagrad(__import__('os'))"], ["cagrad("]),
        (["--surgery=cagrad" + "(" * 5000], ["cagrad("]),
        (["--surgery=cagrad", "--surgery.c"], ["--surgery.c", "got nothing"]),
        (["--surgery=dwa", "--surgery.every=0"], ["every", "0"]),
        (["--surgery=dwa(every=1.5)"], ["every", "1.5"]),
        (["--surgery=constant"], ["surgery.values"]),
        (["--surgery.c=0.4"], ["pcgrad(c=0.4)", "no options"]),
        (["--surgery=sum", "--surgery.c=0.4"], ["sum(c=0.4)", "no options"]),
        (["--surgery=upgrad", "--sampling=shuffled"], ["--surgery upgrad", "--sampling shuffled", "--surgery sum"]),
        (["--surgery=famo", "--sampling=round-robin"], ["--surgery famo", "--sampling round-robin"]),
    ],
)
def test_a_mistake_is_one_line(words, parts):
    with pytest.raises(UserError) as caught:
        surgery_of(*words)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for part in parts:
        assert part in message


def test_a_wrong_number_of_constant_weights_is_one_line(run):
    with pytest.raises(UserError, match=r"--surgery.values must be 3 numbers, .* got \[1.0, 2.0\]"):
        run("constant(values=[1, 2])")


def test_every_rule_and_every_option_is_in_the_help_and_on_the_page(capsys):
    with pytest.raises(SystemExit):
        surgery_of("--help-all")
    shown = "".join(capsys.readouterr().out.split())  # lines are cut after hyphens too
    page = (Path(__file__).parents[1] / "docs" / "options.md").read_text()
    for name in WEIGHTINGS:
        assert name in shown
        assert f"`{name}`" in page


def test_the_start_line_says_the_rule_with_its_options_and_others_do_not_resume_it(run, capsys):
    run("cagrad", "--steps=1")
    assert "surgery cagrad(c=0.4)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--surgery \(was cagrad\(c=0.4\), is cagrad\(c=0.5\)\)"):
        run("cagrad", "--surgery.c=0.5", "--steps=1", "--resume")


# State in checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writer", "tasks", "parts", "message"),
    [
        (None, 3, None, "is missing: the checkpoint holds no state of --surgery famo"),
        ("dwa", 3, None, r"holds the state of --surgery dwa\(.*\) \(3 tasks, 1 parts\), and this run has famo\("),
        ("famo(lr=0.5)", 3, None, r"holds the state of --surgery famo\(lr=0.5.*; resume with those that wrote it"),
        ("famo", 2, None, r"\(2 tasks, 1 parts\), and this run has famo\(.*\) \(3 tasks, 1 parts\); resume with"),
        ("famo", 3, 4, r"\(3 tasks, 4 parts\), and this run has famo\(.*\) \(3 tasks, 1 parts\); resume with"),
        (f"{__name__}:Seen", 3, None, "holds the state of --surgery another kind"),
        ("nan", 3, None, "is damaged; restore it from a copy"),
        ("bytes", 3, None, "damaged or cut short"),
    ],
)
def test_a_state_that_does_not_fit_is_one_line(writer, tasks, parts, message, tmp_path):
    if writer == "bytes":
        (tmp_path / STATE).write_bytes(b"\xff" * 100)
    elif writer is not None:
        (other,) = find_surgery("famo" if writer == "nan" else writer)
        other.prepare(tasks, CPU, parts)
        if writer == "nan":
            other.weighting.state[0] = math.nan
        other.weighting.save(tmp_path)
    (surgery,) = find_surgery("famo")
    surgery.prepare(3, CPU)
    with pytest.raises(UserError, match=message) as caught:
        surgery.weighting.load(tmp_path, CPU)
    assert "\n" not in str(caught.value)
    assert not surgery.weighting.state.any()


def test_a_run_too_short_for_dwa_says_so(quick, capsys, tmp_path):
    said = "every=3), 6 steps: all weights are 1 in its first 6 steps: it is sum here; give a smaller --surgery.every"
    for every, shown in ((3, True), (2, False)):
        out = tmp_path / str(every)
        assert train.main([*quick, "--epochs=1", "--surgery=dwa", f"--surgery.every={every}", f"--out={out}"]) == 0
        assert (said in capsys.readouterr().out) == shown
