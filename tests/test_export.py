"""Exported models give minbert's outputs: of every head and pooling, in each format."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from export_models import MAX_LENGTH, TOKENIZER, examples_of, task_of, trained

from minbert import kernels
from minbert.errors import UserError
from minbert.export import classifier, onnx_graph, sentence_encoder
from minbert.export.padded_model import PaddedModel
from minbert.export.trained import Trained
from minbert.model import HEADS, POOLINGS
from minbert.model.heads import CosineHead, ScaledCosineHead
from minbert.tasks import Task
from minbert.tasks.metrics import predictions

SHARED = (None, "linear", "transform")
FILES = onnx_graph.GRAPH, onnx_graph.INT8_GRAPH


def padded(trained: Trained, task: Task) -> list[torch.Tensor]:
    """The inputs of the padded model: ids, types and mask of each sequence of the examples, padded to one length."""
    encoded = trained.encoded(task, examples_of(task))
    width = encoded.width
    ids, types, mask = torch.zeros(3, len(encoded) * width, MAX_LENGTH, dtype=torch.int64)
    for row, (start, end) in enumerate(zip(encoded.offsets, encoded.offsets[1:], strict=False)):
        ids[row, : end - start] = torch.from_numpy(encoded.token_ids[start:end])
        types[row, : end - start] = torch.from_numpy(encoded.token_type_ids[start:end])
        mask[row, : end - start] = 1
    return [tensor[number::width] for number in range(width) for tensor in (ids, types, mask)]


# The padded model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_no_head_or_pooling(head, pooling):
    task = task_of("sts", head=head)
    for shared in SHARED:
        exported = trained(task, pooling=pooling, shared_layer=shared)
        exported.model.double()
        packed = exported.encoded(task, examples_of(task)).pack(np.arange(16))
        with torch.inference_mode(), kernels.use_backend("reference"):
            expected = exported.model(packed, {"sts": 16})["sts"]
            (found,) = PaddedModel(exported.model, ["sts"])(*padded(exported, task))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# ONNX --------------------------------------------------------------------------------------------------------------

pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
onnx = pytest.importorskip("onnx", reason="needs the extra [onnx]")


@pytest.mark.parametrize("number", range(len(HEADS)), ids=HEADS)
def test_a_graph_gives_the_outputs_of_a_head(number, tmp_path):
    """All heads, each with one of the poolings and shared layers."""
    loss = "binary_cross_entropy" if list(HEADS)[number] == "scaled-cosine" else ""  # its scores are all near 5
    task = task_of("sts", head=list(HEADS)[number], loss=loss)
    exported = trained(task, pooling=POOLINGS[number % 4], shared_layer=SHARED[number % 3])
    onnx_graph.write(exported, tmp_path)
    found = onnx_graph.compare(exported, tmp_path, task, examples_of(task))
    assert found.largest < 1e-5
    assert np.ptp(exported.outputs(task, examples_of(task))) > 1e-3
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "tokenizer.json", "minbert.json"}


def test_a_graph_has_an_output_for_each_task_and_standard_operators_alone(tmp_path):
    tasks = [task_of("sst"), task_of("qqp"), task_of("sts", loss="binary_cross_entropy")]
    exported = trained(*tasks, pooling="mean")
    onnx_graph.write(exported, tmp_path)
    for task in tasks:
        found = onnx_graph.compare(exported, tmp_path, task, examples_of(task))
        assert found.largest < 1e-5
        assert found.equal == (None if task.is_regression else 16)
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", 17)]
    assert [output.name for output in graph.graph.output] == ["sst", "qqp", "sts"]
    assert onnx_graph.Graph(tmp_path).outputs(examples_of(tasks[0]))["sst"].shape == (16, 5)


def test_tasks_that_read_examples_differently_are_no_graph(tmp_path):
    exported = trained(task_of("sst"), task_of("sts", head="cosine"))
    with pytest.raises(UserError, match=r"cross-encoder: sst; bi-encoder: sts.*--task NAME"):
        onnx_graph.check(exported)


def test_int8_weights_make_a_smaller_graph_with_nearly_the_same_outputs(tmp_path):
    exported, task = trained(task_of("sst")), task_of("sst")
    onnx_graph.write(exported, tmp_path)
    onnx_graph.quantise(tmp_path)
    full, int8 = (onnx_graph.Graph(tmp_path, file).outputs(examples_of(task))["sst"] for file in FILES)
    assert (tmp_path / FILES[1]).stat().st_size < 0.8 * (tmp_path / FILES[0]).stat().st_size
    assert 0 < np.abs(full - int8).max() < 0.2 * np.ptp(full)


# transformers ------------------------------------------------------------------------------------------------------

CLASSIFIERS = {
    "classes": task_of("sst"),
    "two classes": task_of("qqp"),
    "two texts as classes": task_of("qqp", classes=("no", "yes"), loss="cross_entropy"),
    "booleans": task_of("qqp", classes=(False, True)),
    "scores": task_of("sts"),
    "scores of another scale": task_of("sts", scale=(-20.0, 100.0)),
    "labels": task_of("sst", type="multilabel", classes=("a", "b", "c"), loss="binary_cross_entropy", metrics=()),
    "labels above thresholds": task_of(
        "sst",
        type="multilabel",
        classes=("a", "b", "c"),
        loss="binary_cross_entropy",
        metrics=(),
        thresholds=(0.3, 0.5, 0.7),
    ),
}


@pytest.mark.parametrize("pooling", ["cls", "pooler"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_pipeline_gives_labels_and_scores(kind, pooling, tmp_path):
    transformers = pytest.importorskip("transformers")
    task, examples = CLASSIFIERS[kind], examples_of(CLASSIFIERS[kind])
    exported = trained(task, pooling=pooling)
    classifier.write(exported, tmp_path)
    found = classifier.compare(exported, tmp_path, task, examples)
    assert found.largest < 1e-5 * max(1, (task.scale[1] - task.scale[0]) / 5)
    assert found.equal == (None if task.is_regression else len(examples))
    if task.is_multilabel:
        return
    pipeline = transformers.pipeline("text-classification", str(tmp_path), device="cpu")
    for text, pair, value in zip(
        examples.texts, examples.pairs or [None] * 16, predictions(task, exported.outputs(task, examples)), strict=True
    ):
        answer = pipeline([{"text": text, "text_pair": pair}] if pair else text, truncation=True)[0]
        if task.is_regression:
            low, high = task.scale
            assert answer["label"] == "sts"
            assert answer["score"] == pytest.approx(low + value * (high - low) / 5, abs=1e-3)
        else:
            assert answer["label"] == json.dumps(task.classes[int(value)]).strip('"')


@pytest.mark.parametrize(
    ("task", "options", "what"),
    [
        (task_of("sts", head="cosine"), {}, "head cosine"),
        (task_of("sst", head="layers"), {}, "head layers"),
        (task_of("sst"), {"pooling": "mean"}, "pooling mean"),
        (task_of("sst"), {"shared_layer": "linear"}, "a shared layer"),
        (task_of("sts", loss="binary_cross_entropy"), {}, "a score by binary_cross_entropy"),
    ],
)
def test_a_head_without_counterpart_names_the_export_to_take(task, options, what):
    with pytest.raises(UserError, match=rf"{task.name} has {what}, .*; --to onnx exports every head$"):
        classifier.check(trained(task, **options))


def test_a_classifier_has_one_task():
    with pytest.raises(UserError, match="the run has sst, qqp; give --task NAME"):
        classifier.check(trained(task_of("sst"), task_of("qqp")))


# sentence-transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "cosine", "projected-cosine", "scaled-cosine"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_what_the_head_reads_and_their_similarity_is_its_cosine(head, pooling, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    task = task_of("sts", head=head)
    shared_layer = SHARED[(list(HEADS).index(head) + POOLINGS.index(pooling)) % 3]
    exported = trained(task, pooling=pooling, shared_layer=shared_layer)
    sentence_encoder.write(exported, tmp_path)
    examples = examples_of(task)
    assert sentence_encoder.compare(exported, tmp_path, task, examples).largest < 1e-5
    assert len(sentence_encoder.notes(exported)) == (head == "linear")
    if not isinstance(exported.model.heads["sts"], CosineHead):
        return
    encoder = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert encoder.max_seq_length == MAX_LENGTH
    one, other = (encoder.encode(list(texts)) for texts in (examples.texts, examples.pairs))
    cosines = encoder.similarity_pairwise(one, other)
    outputs = 5 * (
        torch.sigmoid(20 * cosines) if isinstance(exported.model.heads["sts"], ScaledCosineHead) else cosines
    )
    np.testing.assert_allclose(outputs, exported.outputs(task, examples), atol=1e-5)


def test_tasks_whose_heads_read_different_vectors_are_no_encoder():
    exported = trained(task_of("qqp"), task_of("sts", head="projected-cosine"))
    with pytest.raises(UserError, match="qqp, sts read different vectors of a sentence; give --task NAME"):
        sentence_encoder.check(exported)
    sentence_encoder.check(trained(task_of("qqp"), task_of("sts", head="cosine")))


# The tokenizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a " * 40, "[SEP] [MASK] café 中文", "\u0000 \n tab\t"])
def test_the_tokenizer_of_a_graph_is_minberts(text, tmp_path):
    onnx_graph.write(trained(task_of("sts")), tmp_path)
    tokenizer = onnx_graph.Graph(tmp_path).tokenizer
    for pair in ("short", text, "b " * 30):
        (found,) = tokenizer.encode_batch([(text, pair)])
        ids, types, *_ = TOKENIZER.encode_batch([text], [pair], MAX_LENGTH)
        assert (found.ids, found.type_ids) == (ids.tolist(), types.tolist())
