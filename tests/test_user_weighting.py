"""--surgery MODULE:NAME(...): what it may say, when it is imported, and that its state survives a resume to the bit."""

from __future__ import annotations

import itertools
import os
import random
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_runs import assert_equal, interrupted, tensors
from torch import Tensor, nn

from minbert import evaluate, predict, train
from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.methods.user_weighting import STATE, UserWeighting
from minbert.report import __main__ as report

HERE = __name__
GRAM = torch.tensor([[4.0, -1.0], [-1.0, 9.0]], dtype=torch.float64)


def constant(*weights: float, scale: float = 1.0):
    """A factory of weightings."""
    return lambda gram: scale * torch.tensor(weights, dtype=gram.dtype)


class Mode(Enum):
    EARLY = 1
    LATE = 2


class Inner:
    """An object in an object, with a weighting's kinds of state."""

    def __init__(self) -> None:
        self.calls, self.history, self.best = 0, [], {"norm": (0.0, None)}
        self.array, self.mode, self.dtype = np.zeros(2, dtype=np.float32), Mode.EARLY, torch.float32
        self.generator = torch.Generator().manual_seed(1)
        self.activation = torch.relu


class Remembers(nn.Module):
    """Weights that depend on all Gram matrices before, by a buffer, a parameter, and attributes of all kinds."""

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.decay, self.inner = decay, Inner()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.optimizer = torch.optim.Adam([self.scale], lr=0.1)
        self.register_buffer("average", None)

    def forward(self, gram: Tensor) -> Tensor:
        norms, inner = gram.diagonal(), self.inner
        self.average = norms if self.average is None else self.decay * self.average + (1 - self.decay) * norms
        inner.calls += 1
        inner.history = [*inner.history, norms.sum().item()][-3:]
        inner.best["norm"] = (max(inner.history), "seen")
        inner.array = inner.array + np.float32(1)
        inner.mode = Mode.LATE if inner.calls > 3 else Mode.EARLY
        self.optimizer.zero_grad()
        (self.scale * self.average.mean() - 1).square().backward()
        self.optimizer.step()
        noise = torch.rand(len(gram), dtype=gram.dtype, generator=inner.generator)
        total = sum(inner.history) + inner.best["norm"][0] + float(inner.array.sum()) + inner.mode.value
        return self.scale * (1 + self.average / self.average.sum() + 0.1 * noise + 1e-3 * total)


class WithProtocol:
    """A weighting that says itself what its state is."""

    def __init__(self) -> None:
        self.factors, self.lock = iter(itertools.count(1)), object()
        self.calls = 0

    def __call__(self, gram: Tensor) -> Tensor:
        self.calls += 1
        return gram.new_full((len(gram),), 1 / self.calls)

    def state_dict(self) -> dict:
        return {"calls": self.calls, "nested": {"tensor": torch.tensor([self.calls])}}

    def load_state_dict(self, state: dict) -> None:
        assert state["nested"]["tensor"].tolist() == [state["calls"]]
        self.calls = state["calls"]


class Unsavable:
    def __init__(self) -> None:
        self.turns = itertools.count()

    def __call__(self, gram: Tensor) -> Tensor:
        return gram.new_full((len(gram),), next(self.turns))


class UnsavableLater:
    def __call__(self, gram: Tensor) -> Tensor:
        self.turns = [itertools.count()]
        return gram.new_ones(len(gram))


class Random:
    """Follows the default generators of torch, numpy and Python."""

    def __call__(self, gram: Tensor) -> Tensor:
        return gram.new_tensor([torch.rand(()).item() + np.random.rand() + random.random()] * len(gram))


class Unseeded(Remembers):
    """Another weighting in every process but the first one."""

    def forward(self, gram: Tensor) -> Tensor:
        rank = int(os.environ.get("RANK", "0"))
        return super().forward(gram) * (1 + rank)


def call(weighting: UserWeighting, seed: int = 0, gram: Tensor = GRAM) -> list[float]:
    return weighting(gram, torch.Generator().manual_seed(seed)).tolist()


# The option -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call_of", "weights"),
    [
        ("constant(1, 2.5)", [1, 2.5]),
        ("constant( -1, 2, scale = 2 )", [-2, 4]),
        ("constant(*[1, 2])", None),
        ("constant(1, **{'scale': 2})", None),
        ("constant(1, scale=two)", None),
        ("constant(1, scale=__import__('os'))", None),
        ("constant(1)(2)", None),
        ("constant[0]", None),
        ("constant(1", None),
        ("", None),
        ("constant" + "(" * 5000, None),
        ("constant(" + "-" * 100_000 + "1)", None),
        ("constant('\0')", None),
    ],
)
def test_arguments_are_literals_and_everything_else_is_one_line(call_of: str, weights) -> None:
    name = f"{HERE}:{call_of}"
    if weights is not None:
        assert call(UserWeighting(name)) == weights
        assert parse_layers("train", TrainConfig, ["--surgery", name]).surgery == name
        return
    with pytest.raises(UserError, match="expected MODULE:NAME or MODULE:NAME") as caught:
        TrainConfig(surgery=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [":f", "a b:f", "../payload:f", "a..b:f", ".a:f", "a:f:g"])
def test_a_module_is_a_dotted_name(name: str) -> None:
    with pytest.raises(UserError, match="expected MODULE:NAME or"):
        TrainConfig(surgery=name)


def test_arguments_survive_the_configuration_file(tmp_path) -> None:
    config = TrainConfig(surgery="a.b:C([1, 'x: #'], c={'y': 0.4})")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Remembers(1, 2, 3)", r"cannot be loaded \(.*positional arguments"),
        ("constant(scale=1, size=2)", "cannot be loaded .*unexpected keyword argument 'size'"),
        ("Unsavable", r"its attribute turns \(count\) cannot be saved in a checkpoint; give the class state_dict\(\)"),
    ],
)
def test_what_cannot_be_built_or_saved_is_refused_at_the_start(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--surgery {HERE}:{name.replace('(', '.').replace(')', '.')}: {message}"):
        UserWeighting(f"{HERE}:{name}")


def test_state_that_the_first_step_adds_is_refused_in_it() -> None:
    weighting = UserWeighting(f"{HERE}:UnsavableLater")
    with pytest.raises(UserError, match=r"its attribute turns\[0\] \(count\) cannot be saved"):
        call(weighting)


def test_default_generators_follow_the_step_and_are_left_alone() -> None:
    weighting = UserWeighting(f"{HERE}:Random")
    before = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(()).item(), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    first = call(weighting, seed=2**40 + 1)
    assert (torch.rand(()).item(), np.random.rand(), random.random()) == expected != before
    assert first == call(weighting, seed=2**40 + 1) != call(weighting, seed=2**40 + 2)


def test_a_gram_matrix_that_is_not_finite_does_not_reach_the_state() -> None:
    one, other = UserWeighting(f"{HERE}:Remembers"), UserWeighting(f"{HERE}:Remembers")
    assert call(one, gram=GRAM * float("nan")) == [1.0, 1.0]
    assert call(one) == call(other)


# State ------------------------------------------------------------------------------------------------------------


def grams() -> list[Tensor]:
    rows = torch.randn(8, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [row @ row.T for row in rows]


def check_resume(name: str, directory: Path) -> None:
    straight, first = UserWeighting(name), UserWeighting(name)
    expected = [call(straight, step, gram) for step, gram in enumerate(grams())]
    for step, gram in enumerate(grams()[:5]):
        call(first, step, gram)
    first.save(directory)
    second = UserWeighting(name)
    second.load(directory, torch.device("cpu"))
    assert [call(second, step, gram) for step, gram in enumerate(grams()[5:], 5)] == expected[5:]


@pytest.mark.parametrize("name", ["Remembers", "Remembers(decay=0.5)", "WithProtocol", "constant(1, 2)"])
def test_the_state_goes_on_where_it_was_saved(name: str, tmp_path) -> None:
    check_resume(f"{HERE}:{name}", tmp_path)
    assert (tmp_path / STATE).exists() == (name != "constant(1, 2)")


@pytest.mark.parametrize(
    "name",
    [
        "PCGradWeighting",
        "MGDAWeighting",
        "AlignedMTLWeighting()",
        "GradVacWeighting(beta=0.3)",
        "PCDWeighting(0.1, beta=0.9)",
        "CAGradWeighting(c=0.4)",
        "UPGradWeighting()",
    ],
)
def test_torchjds_weightings_go_on_where_they_were_saved(name: str, tmp_path) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation", reason="needs torchjd, of the extra [bench]")
    if not hasattr(aggregation, name.split("(")[0]):
        pytest.skip(f"this TorchJD has no {name}")
    try:
        UserWeighting(f"torchjd.aggregation:{name}")
    except UserError as error:
        if "to be installed" in str(error):
            pytest.skip(str(error))
        raise
    check_resume(f"torchjd.aggregation:{name}", tmp_path)


def test_two_attributes_that_hold_one_tensor_hold_one_again(tmp_path) -> None:
    weighting = UserWeighting(f"{HERE}:Remembers")
    weighting.weighting.one = weighting.weighting.other = torch.zeros(2)
    weighting.save(tmp_path)
    again = UserWeighting(f"{HERE}:Remembers")
    again.load(tmp_path, torch.device("cpu"))
    assert again.weighting.one is again.weighting.other
    assert again.weighting.optimizer.param_groups[0]["params"][0] is again.weighting.scale


@pytest.mark.parametrize("broken", ["missing", "bytes", "structure", "other"])
def test_a_state_that_does_not_fit_is_one_line(broken: str, tmp_path) -> None:
    path = tmp_path / STATE
    if broken == "bytes":
        path.write_bytes(b"\xff" * 100)
    elif broken == "structure":
        from safetensors.torch import save_file

        save_file({}, path, metadata={"state": '{"attributes": {"inner": {"sequence": "system", "entries": []}}}'})
    elif broken == "other":
        UserWeighting(f"{HERE}:WithProtocol").save(tmp_path)
    problem = "is missing: the checkpoint holds no state of" if broken == "missing" else "does not fit"
    with pytest.raises(UserError, match=f"{STATE} {problem} --surgery {HERE}:Remembers.*; (resume|start)") as caught:
        UserWeighting(f"{HERE}:Remembers").load(tmp_path, torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [f"{HERE}:Remembers(decay=0.6)", "torchjd.aggregation:GradVacWeighting(beta=0.3)"])
def test_a_run_resumes_to_the_bit(name: str, quick, tmp_path) -> None:
    if name.startswith("torchjd"):
        pytest.importorskip("torchjd.aggregation", reason="needs torchjd, of the extra [bench]")
    options = [*quick, f"--surgery={name}", "--smart.lambda-s=0", "--precision=fp32", "--epochs=1"]
    assert train.main([*options, f"--out={tmp_path / 'straight'}"]) == 0
    with interrupted("minbert.methods.user_weighting.UserWeighting.__call__", 5):
        train.main(options)
    assert train.main([*options, "--resume"]) == 0
    files = ("model", "heads", STATE.removesuffix(".safetensors"))
    assert_equal(*(tensors(tmp_path / run, "last", *files) for run in ("straight", "run")))


# A file names code, and is not believed ---------------------------------------------------------------------------


@pytest.fixture
def payload(tmp_path, monkeypatch) -> Path:
    """A module in the working directory; what its import leaves behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    text = "import pathlib\npathlib.Path('marker').touch()\ndef ones(gram):\n    return gram.new_ones(len(gram))\n"
    (tmp_path / "payload.py").write_text(text)
    yield tmp_path / "marker"
    sys.modules.pop("payload", None)


def test_building_and_reading_a_configuration_imports_nothing(payload: Path, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(TrainConfig(surgery="payload:ones(1)").to_yaml())
    TrainConfig.from_yaml(tmp_path / "config.yaml").replace(seed=1)
    assert not payload.exists()


def test_code_in_a_file_of_options_needs_allow_code_on_the_command_line(payload: Path, quick, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("surgery: payload:ones\n")
    options = [*quick, "--steps=1", "--epochs=1", f"--config={tmp_path / 'mine.yaml'}"]
    message = "surgery payload:ones names code to import.*; give --surgery MODULE:NAME there, or --allow-code"
    with pytest.raises(UserError, match=message):
        train.main(options)
    (tmp_path / "mine.yaml").write_text("surgery: payload:ones\nallow_code: true\n")
    with pytest.raises(UserError, match="unknown option allow_code"):
        train.main(options)
    assert not payload.exists()
    (tmp_path / "mine.yaml").write_text("surgery: payload:ones\n")
    assert train.main([*options, "--allow-code"]) == 0
    assert payload.exists()
    assert "allow" not in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("words", [["--surgery", "payload:ones"], ["--surgery=payload:ones"]])
def test_the_command_line_itself_may_name_code(payload: Path, words, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("surgery: payload:other\n")
    config = parse_layers("train", TrainConfig, [*words, "--config", str(tmp_path / "mine.yaml")])
    assert config.surgery == "payload:ones"
    assert not payload.exists()


def test_what_opens_a_run_imports_nothing_that_it_names(payload: Path, quick, tmp_path) -> None:
    assert train.main([*quick, "--steps=1", "--epochs=1"]) == 0
    run, config = tmp_path / "run", tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("surgery: pcgrad", "surgery: payload:ones"))
    (tmp_path / "texts").write_text("one\n")
    assert evaluate.main([str(run)]) == 0
    assert predict.main([str(run), "--task=sst", f"--input={tmp_path / 'texts'}"]) == 0
    assert report.main([str(run)]) == 0
    with pytest.raises(UserError, match=r"--surgery \(was payload:ones, is pcgrad\)"):
        train.main([*quick, "--steps=1", "--epochs=1", "--resume"])
    with pytest.raises(UserError, match="surgery payload:ones names code to import"):
        train.main([*quick, "--steps=1", "--epochs=1", "--resume", f"--config={config}"])
    assert not payload.exists()
