"""Options: layers, spellings, and one clear line for every mistake."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from minbert import cli
from minbert.cli import parse_layers
from minbert.config import ScratchConfig, TrainConfig
from minbert.errors import UserError, dashed
from minbert.methods.smart import SmartConfig


def parse(*words: str) -> TrainConfig:
    return parse_layers("train", TrainConfig, words)


def refusal(*words: str) -> str:
    """The one line with which options are refused."""
    with pytest.raises(UserError) as caught:
        parse(*words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_options_give_the_defaults_of_the_record():
    assert parse() == TrainConfig()


def test_the_default_is_pcgrad_without_smart():
    assert parse("--recipe=pcgrad").replace(recipe=None) == TrainConfig()


def test_command_line_beats_file_beats_recipe(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("lr: 0.25\nepochs: 7\nseed: 5\n")
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "fast.yaml").write_text("epochs: 9\nbatch_size: 3\nseed: 4\n")
    monkeypatch.setattr("minbert.recipes.FOLDER", recipes)
    config = parse("--seed", "6", "--recipe", "fast", "--config", str(tmp_path / "mine.yaml"))
    assert (config.batch_size, config.epochs, config.lr, config.seed) == (3, 7, 0.25, 6)
    (tmp_path / "mine.yaml").write_text("recipe: fast\n")
    assert parse("--config", str(tmp_path / "mine.yaml")).batch_size == 3


@pytest.mark.parametrize("words", [["--batch-size={sst: 2, sts: 8}"], ["--batch-size.sst=2", "--batch-size.sts", "8"]])
def test_a_number_for_each_task(words):
    config = parse(*words, "--tasks=sst,sts", "--swap-pairs=sts")
    assert config.batch_size == {"sst": 2, "sts": 8}
    assert (config.batch_size_of("sst"), config.batch_size_of("sts")) == (2, 16)
    with pytest.raises(UserError, match="--batch-size has none for qqp"):
        config.batch_size_of("qqp")


@pytest.mark.parametrize("words", [["--tasks", "sst,sts"], ["--tasks", "sst", "sts"], ["--tasks=[sst,sts]"]])
def test_lists_can_be_spelt_three_ways(words):
    assert parse(*words, "--seed", "1").tasks == ["sst", "sts"]


def test_dashes_underscores_flags_and_nested_options():
    config = parse("--batch-size=4", "--head_dropout", "0.2", "--resume", "--out", "x", "--scratch.hidden-size", "32")
    assert (config.batch_size, config.head_dropout, config.resume) == (4, 0.2, True)
    assert config.scratch == ScratchConfig(hidden_size=32)


def test_options_by_task():
    words = ["--heads.sts=cosine", "--heads.qqp", "concatenated", "--losses.sts=cosine_embedding"]
    config = parse(*words, "--pooling.sts=mean", "--l2=0.5")
    assert config.heads == {"sts": "cosine", "qqp": "concatenated"}
    assert [(task.head, task.loss) for task in config.chosen_tasks(["sst", "qqp", "sts"])] == [
        ("linear", "cross_entropy"),
        ("concatenated", "binary_cross_entropy"),
        ("cosine", "cosine_embedding"),
    ]
    assert (config.pooling, config.l2) == ({"sts": "mean"}, 0.5)
    of_one = parse("--recipe=smart", "--smart.lambda-s=0", "--smart.lambda-s.sst=5", "--l2=0.5", "--l2={sts: 1}")
    assert (of_one.smart.lambda_s, of_one.l2) == ({"sst": 5}, {"sts": 1})


def test_yaml_round_trip(tmp_path):
    by_task = {"heads": {"sts": "cosine"}, "pooling": {"sts": "mean"}, "l2": {"qqp": 0.5}}
    config = TrainConfig(tasks=["sts"], lr=0.125, epoch_length=7, scratch=ScratchConfig(hidden_size=8), **by_task)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config


def test_print_config_prints_what_config_reads(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--lr", "0.5", "--print-config")
    assert stop.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "printed.yaml")) == TrainConfig(lr=0.5)


def help_of(option, capsys):
    """The options on a page of help by the titles of their groups."""
    with pytest.raises(SystemExit) as stop:
        parse(option)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    titles = re.split(r"^(\w+):$", text, flags=re.MULTILINE)
    return text, {
        title: re.findall(r"^  (--\S+)", part, re.MULTILINE)
        for title, part in zip(titles[1::2], titles[2::2], strict=True)
    }


def test_help_all_documents_every_option_in_its_group(capsys):
    text, groups = help_of("--help-all", capsys)
    assert list(groups) == ["data", "model", "method", "schedule", "run"]
    shown = [option for options in groups.values() for option in options]
    assert len(shown) == len(set(shown))
    assert {dashed(name) for config in (TrainConfig, cli.FileOptions) for name, _ in cli.options_of(config)} == set(
        shown
    )
    assert {"--smart.lambda-s", "--surgery"} <= set(groups["method"])
    assert {"--config", "--out"} <= set(groups["run"])
    assert groups["schedule"][:3] == ["--epochs", "--batch-size", "--lr"]  # the common ones first
    assert "learning rate" in text


def test_help_shows_the_common_dozen_and_where_the_rest_is(capsys):
    text, groups = help_of("--help", capsys)
    assert [option for options in groups.values() for option in options] == [*map(dashed, TrainConfig.COMMON)]
    assert len(TrainConfig.COMMON) == 12
    _, of_all = help_of("--help-all", capsys)
    assert text.endswith(f"\n--help-all lists all {sum(map(len, of_all.values()))} options.\n")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--batch-sise", "4"], ["--batch-sise", "did you mean '--batch-size'"]),
        (["--scratch.hidden", "4"], ["--scratch.hidden", "--scratch.hidden-size"]),
        (["--batch-size", "four"], ["--batch-size", "int", "'four'"]),
        (["--precision", "fp8"], ["--precision", "auto", "fp32", "bf16", "'fp8'"]),
        (["--epoch-length", "long"], ["--epoch-length", "smallest", "largest", "'long'"]),
        (["--epoch-length", "0"], ["--epoch-length", "0"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1", "0"]),
        (["--lr", "-1"], ["--lr", "between 0 and 1", "-1"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--clip-norm", "inf"], ["--clip-norm", "inf"]),
        (["--warmup", "1"], ["--warmup", "below 1"]),
        (["--batch-size.sts=0"], ["--batch-size.sts", "at least 1", "0"]),
        (["--batch-size.stt=2"], ["--batch-size", "'stt'", "did you mean 'sts'"]),
        (
            ["--batch-size=9", "--batch-size.sts=2"],
            ["--batch-size.sts 2: --batch-size is 9 for all", "'{sts: 2, ...}'"],
        ),
        (["--recipe=smart", "--smart.lambda-s.sst=5"], ["--smart.lambda-s is 1.0 for all tasks"]),
        (["--sampling-alpha=100"], ["--sampling-alpha", "between 0 and 10", "100"]),
        (["--batch-size.sts=many"], ["--batch-size.sts", "int", "got 'many'"]),
        (["--loss-weights={sst: -1}"], ["--loss-weights.sst", "more than 0"]),
        (["--epoch-length", "each"], ["--epoch-length each", "--sampling joint"]),
        (["--optimizers", "per-task"], ["--optimizers per-task", "--sampling joint"]),
        (["--sampling-weights={sst: 2}"], ["--sampling-weights", "--loss-weights"]),
        (["--sampling=shuffled", "--surgery=sum", "--sampling-alpha=0.5"], ["--sampling-alpha", "proportional"]),
        (["--sampling=sequental"], ["--sampling", "sequential", "'sequental'"]),
        (["--epoch-times", "0"], ["--epoch-times", "at least 1"]),
        (["--head-lr", "2"], ["--head-lr", "between 0 and 1"]),
        (["--swap-pairs", "sst"], ["--swap-pairs sst", "single sentences", "qqp, sts"]),
        (["--augmented.sts5=x"], ["--augmented", "'sts5'", "did you mean 'sts'"]),
        (["--tasks", "sst,yelp"], ["yelp", "--reviews FILE"]),
        (["--tasks", "yelp", "--reviews", "x"], ["yelp", "no dev split"]),
        (["--scratch.hidden-size", "0"], ["--scratch.hidden-size", "positive", "0"]),
        (["--tasks", "sst,stts"], ["'stts'", "did you mean 'sts'"]),
        (["--tasks", "sst,sst"], ["different", "sst"]),
        (["--recipe", "plian"], ["'plian'", "did you mean 'plain'"]),
        (["--resume"], ["--out", "--resume"]),
        (["--heads.stss=cosine"], ["--heads", "'stss'", "did you mean 'sts'"]),
        (["--heads.sts=cosin"], ["--heads.sts", "'cosin'", "did you mean 'cosine'"]),
        (["--heads.sst=cosine"], ["--heads.sst cosine", "SST-5", "single", "linear or layers"]),
        (["--losses.sts=cross_entropy"], ["--losses.sts", "labels of STS-B", "mean_squared_error"]),
        (["--losses.qqp=cosine_embeding"], ["--losses.qqp", "did you mean 'cosine_embedding'"]),
        (["--losses.sts=cosine_embedding"], ["head linear", "--heads.sts cosine or projected-cosine"]),
        (["--pooling=men"], ["--pooling", "'men'", "did you mean 'mean'"]),
        (["--pooling.sts=firts"], ["--pooling", "'firts'", "cls"]),
        (["--l2.qpq=1"], ["--l2", "'qpq'", "did you mean 'qqp'"]),
        (["--l2.qqp=-1"], ["--l2", "0 or more", "-1"]),
        (["--shared-layer=liner"], ["--shared-layer", "linear", "transform"]),
        (["--heads.sts=layers", "--batch-size=1"], ["--batch-size 1", "--heads.sts layers", "at least 2"]),
        (["--shared-layer=transform", "--batch-size=1"], ["--batch-size 1", "--shared-layer transform"]),
        (["--lr"], ["--lr"]),
        (["train"], ["'train'", "--help-all lists them"]),
    ],
)
def test_a_mistake_is_named_in_one_line(words, parts):
    message = refusal(*words)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr: [", ["line 2", "not valid YAML"]),
        ("- lr", ["option: value", "list"]),
        ("learning_rate: 1", ["learning_rate"]),
        ("batchsize: 1", ["batchsize", "did you mean 'batch_size'"]),
        ("lr: fast", ["--lr", "fast"]),
        ("lr: 7", ["--lr", "between 0 and 1"]),
    ],
)
def test_a_mistake_in_a_file_is_named_in_one_line(tmp_path, text, parts):
    file = tmp_path / "mine.yaml"
    file.write_text(text + "\n")
    message = refusal("--config", str(file))
    for part in parts:
        assert part in message


def test_a_missing_config_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.yaml.*No such file"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("smart: null", ["--smart", "a record of lambda_s", "got null"]),
        ("smart: {steps: null}", ["--smart.steps", "int", "got null"]),
        ("smart: {stepz: 1}", ["smart.stepz", "did you mean 'smart.steps'"]),
        ("scratch: [1]", ["--scratch", "a record of vocab_size", "a list"]),
        ("batch_size: {sst: null}", ["--batch-size.sst", "int", "got null"]),
        ("batch_size: {sst: {a: 1}}", ["--batch-size.sst", "int", "an object"]),
        ("batch_size: 9223372036854775808", ["--batch-size", "int", "9223372036854775808"]),
        ("batch_size: true", ["--batch-size", "int", "got true"]),
        ("epochs: null", ["--epochs", "int", "null"]),
        ("epochs: 2.5", ["--epochs", "int", "2.5"]),
        ("epochs: 2001-01-01", ["--epochs", "int", "'2001-01-01'"]),
        ("seed: {}", ["--seed", "int", "an object"]),
        ("lr: .inf", ["--lr", "float", "inf"]),
        ("lr: .nan", ["--lr", "float", "nan"]),
        ("tasks: sst", ["--tasks", "list[str]", "'sst'"]),
        ("tasks: [sst, 1]", ["--tasks[1]", "str", "got 1"]),
        ("heads: {1: linear}", ["--heads", "names as keys", "got 1"]),
        ("heads: []", ["--heads", "a mapping", "a list"]),
        ("resume: 1", ["--resume", "bool", "got 1"]),
        ("epoch_length: [1]", ["--epoch-length", "'smallest'", "int", "a list"]),
        ("1: 2", ["unknown option 1"]),
        ("lr: 0.1\nlr: 0.2", ["line 1", "a key is repeated"]),
        ("heads: &a {sst: linear}\nlosses: *a", ["line 2", "aliases"]),
        ("out: !!python/object/apply:os.system [touch x]", ["line 1", "python/object/apply:os.system"]),
        ("[" * 5000, ["nested too deeply"]),
        ("format: 9", ["format 9", "formats up to 2"]),
        ("format: new", ["format", "'new'"]),
        ("a: " + "x" * 300_000, ["262144 bytes"]),
    ],
)
def test_any_value_of_any_type_in_a_file_is_one_line(tmp_path, text, parts):
    file = tmp_path / "mine.yaml"
    file.write_text(text + "\n")
    message = refusal("--config", str(file))
    assert message.startswith("--config ")
    assert str(file) in message
    assert len(message) < 500
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("--smart=null", ["--smart", "a record of", "null"]),
        ("--smart={steps: null}", ["--smart.steps", "int", "null"]),
        ("--smart={stepz: 1}", ["smart.stepz", "did you mean 'smart.steps'"]),
        ("--scratch=[1]", ["--scratch", "a record of vocab_size", "a list"]),
        ("--scratch={hidden_size: wide}", ["--scratch.hidden-size", "int", "'wide'"]),
        ("--batch-size={sst: null}", ["--batch-size.sst", "int", "null"]),
        ("--batch-size={sst: 2, sst: 3}", ["--batch-size", "int", "'{sst: 2, sst: 3}'"]),
        ("--heads={sts: [cosine]}", ["--heads.sts", "str", "a list"]),
        ("--resume=maybe", ["--resume", "bool", "'maybe'"]),
        ("--batch-size=9223372036854775808", ["--batch-size", "int", "9223372036854775808"]),
        ("--lr=1e400", ["--lr", "float", "inf"]),
    ],
)
def test_any_value_of_any_type_on_the_command_line_is_one_line(word, parts):
    message = refusal(word)
    for part in parts:
        assert part in message


def test_the_config_of_a_run_is_a_file_of_options(tmp_path):
    config = TrainConfig(tasks=["sts"], lr=0.125, heads={"sts": "cosine"}, smart=SmartConfig(steps=3))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse("--config", str(tmp_path / "config.yaml")) == config
    (tmp_path / "mine.yaml").write_text("smart: {eta: 0.5}\nbatch_size: {sts: 4}\nlr: 1e-3\n")
    layered = parse("--config", str(tmp_path / "config.yaml"), "--config", str(tmp_path / "mine.yaml"), "--epochs=5")
    smart = SmartConfig(steps=3, eta=0.5)
    assert layered == config.replace(smart=smart, batch_size={"sts": 4}, lr=0.001, epochs=5)
    assert parse("--config", str(tmp_path / "config.yaml"), "--heads.sts=linear").heads == {"sts": "linear"}


def test_a_record_of_options_is_no_dictionary():
    for name in ("smart", "bregman", "scratch"):
        with pytest.raises(UserError, match=f"--{name} must be a {name.capitalize()}Config, got {{}}"):
            TrainConfig(**{name: {}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "cosine"}, "--schedule: expected one of 'linear', 'constant'"),
        ({"mode": "Pretrain"}, "--mode: expected"),
        ({"batch_size": "8"}, "--batch-size: expected int"),
        ({"resume": 1, "out": "x"}, "--resume: expected bool"),
        ({"tasks": "sst"}, "--tasks: expected"),
        ({"smart": SmartConfig(masks="indep")}, "--smart.masks: expected"),
        ({"scratch": ScratchConfig(hidden_size=32.0)}, "--scratch.hidden-size: expected int"),
    ],
)
def test_options_of_a_program_have_the_types_of_those_of_files(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TrainConfig(**values)


def test_a_program_may_give_paths_and_tuples():
    config = TrainConfig(out=Path("runs") / "x", tasks=("sst", "sts"), l2=1)
    assert (config.out, config.tasks, config.l2) == (os.path.join("runs", "x"), ["sst", "sts"], 1.0)
