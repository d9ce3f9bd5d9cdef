"""Checkpoints of every kind in, checkpoints that transformers reads out, and the errors between."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from minbert.data.packing import Packed
from minbert.errors import UserError
from minbert.model import Encoder


def rewrite(checkpoint: Path, change) -> None:
    """Replace the checkpoint's tensors by `change(tensors)`."""
    path = checkpoint / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def same(encoder: Encoder, other: Encoder) -> bool:
    ours, theirs = encoder.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("pooler", [True, False])
def test_saved_encoder_loads_back_to_the_bit_here_and_in_transformers(
    checkpoint: Path, theirs: transformers.BertModel, packed: Packed, tmp_path: Path, pooler: bool
) -> None:
    encoder = Encoder.from_pretrained(checkpoint, pooler=pooler)
    encoder.save_pretrained(tmp_path / "saved")
    assert same(encoder, Encoder.from_pretrained(tmp_path / "saved"))
    again, info = transformers.BertModel.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    absent = set() if pooler else {"pooler.dense.weight", "pooler.dense.bias"}
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == (absent, set())
    for name, parameter in theirs.state_dict().items():
        if name not in absent:
            assert torch.equal(parameter, again.state_dict()[name]), name
    ids = packed.token_ids[:7][None]
    assert torch.equal(theirs(ids).last_hidden_state, again.eval()(ids).last_hidden_state)


def test_encoder_can_be_saved_over_the_checkpoint_it_came_from(checkpoint: Path) -> None:
    encoder = Encoder.from_pretrained(checkpoint)
    encoder.save_pretrained(checkpoint)
    assert same(encoder, Encoder.from_pretrained(checkpoint))


def test_loading_leaves_torchs_generator_alone_and_the_encoder_in_evaluation_mode(checkpoint: Path) -> None:
    state = torch.get_rng_state()
    assert not Encoder.from_pretrained(checkpoint).training
    assert torch.equal(torch.get_rng_state(), state)


def test_prefixes_heads_buffers_and_old_layer_norm_names_load_the_same(checkpoint: Path) -> None:
    expected = Encoder.from_pretrained(checkpoint)

    def as_pretraining(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {re.sub("|".join(old), lambda match: old[match[0]], f"bert.{name}"): t for name, t in tensors.items()}
        heads = {"cls.seq_relationship.weight": torch.zeros(2, 32), "classifier.weight": torch.zeros(3, 32)}
        return {**renamed, **heads, "bert.embeddings.position_ids": torch.arange(40)[None]}

    rewrite(checkpoint, as_pretraining)
    assert same(expected, Encoder.from_pretrained(checkpoint))


def test_sharded_checkpoints_load_the_same(checkpoint: Path, theirs: transformers.BertModel, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert same(Encoder.from_pretrained(checkpoint), Encoder.from_pretrained(tmp_path / "sharded"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_widened_to_float32(checkpoint: Path, dtype: torch.dtype) -> None:
    expected = Encoder.from_pretrained(checkpoint).to(dtype).float()
    rewrite(checkpoint, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert same(expected, Encoder.from_pretrained(checkpoint))


def test_pooler_is_kept_dropped_or_made_as_asked(checkpoint: Path) -> None:
    kept = Encoder.from_pretrained(checkpoint)
    assert kept.pooler is not None
    assert Encoder.from_pretrained(checkpoint, pooler=False).pooler is None
    rewrite(checkpoint, lambda tensors: {name: t for name, t in tensors.items() if "pooler" not in name})
    assert Encoder.from_pretrained(checkpoint).pooler is None
    made = Encoder.from_pretrained(checkpoint, pooler=True)
    assert made.pooler is not None
    assert not made.pooler.bias.any()
    assert torch.equal(made.layers[0].qkv.weight, kept.layers[0].qkv.weight)


LAYER_2 = "encoder.layer.2.output.dense.bias"
QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != QUERY}, rf"no tensor '{QUERY}' \(1 of 37 are missing\)"),
        (lambda t: {**t, QUERY: torch.zeros(32, 16)}, rf"{QUERY} has shape \[32, 16\], expected \[32, 32\]"),
        (lambda t: {**t, QUERY: torch.zeros(32, 32, dtype=torch.int8)}, rf"{QUERY} is torch.int8, expected floating"),
        (lambda t: {**t, LAYER_2: torch.zeros(32)}, rf"tensor '{LAYER_2}' has no place in the encoder"),
        (lambda t: {f"roberta.{n}": v for n, v in t.items()}, "no tensor 'embeddings.LayerNorm.bias'"),
    ],
)
def test_tensors_that_disagree_with_the_config_are_refused_by_name(checkpoint: Path, change, message: str) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(UserError, match=message) as caught:
        Encoder.from_pretrained(checkpoint, pooler=False)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_files_are_refused(checkpoint: Path, kept: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors .*damaged or cut short"):
        Encoder.from_pretrained(checkpoint)


def test_missing_files_are_refused_by_name(checkpoint: Path, theirs: transformers.BertModel, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    next((tmp_path / "sharded").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"no file .*model-0000.*safetensors; copy or download"):
        Encoder.from_pretrained(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match=r"model.safetensors.index.json: weight_map: expected a mapping, got 3"):
        Encoder.from_pretrained(tmp_path / "sharded")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model.safetensors; give the directory of a BERT checkpoint"):
        Encoder.from_pretrained(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"no file .*config.json; give the directory of a BERT checkpoint"):
        Encoder.from_pretrained(checkpoint)
    with pytest.raises(UserError, match="no directory"):
        Encoder.from_pretrained(checkpoint / "nowhere")


def test_pickled_checkpoints_are_refused_with_a_command_that_converts_them(
    checkpoint: Path, theirs: transformers.BertModel
) -> None:
    expected = Encoder.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), checkpoint / "pytorch_model.bin")
    with pytest.raises(
        UserError, match="a pickle, which minbert does not read; convert them once: python -c"
    ) as caught:
        Encoder.from_pretrained(checkpoint)
    exec(str(caught.value).split('python -c "')[1].removesuffix('"'), {})
    assert same(expected, Encoder.from_pretrained(checkpoint))


def test_hub_names_fetch_configuration_vocabulary_and_safetensors_only(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kw: asked.append((args, kw)) or checkpoint
    )
    assert same(Encoder.from_pretrained(checkpoint), Encoder.from_pretrained("owner/model"))
    assert asked == [(("owner/model",), {"allow_patterns": ["*.json", "vocab.txt", "*.safetensors"]})]


def test_a_connection_lost_on_the_way_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments, **options):
        raise RuntimeError("connection reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lost)
    with pytest.raises(UserError, match=r"the hub is out of reach \(connection reset\);"):
        Encoder.from_pretrained("owner/model")


def test_hub_names_offline_are_refused_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    command = "from minbert.model import Encoder; from minbert.errors import UserError\n"
    command += "try: Encoder.from_pretrained('owner/absent')\nexcept UserError as error: print(error)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment)
    assert run.stdout.startswith("'owner/absent' is not a directory, and the hub is out of reach"), run.stderr
    assert run.stdout.count("\n") == 1
