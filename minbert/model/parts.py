"""The parts of a model that surgery treats by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from minbert.model.multitask import MultitaskModel

SCOPES = ("model", "layer", "module")


class ModelParts(NamedTuple):
    """What the tasks share, in G parts: their names, and by parameter the number of its part."""

    names: tuple[str, ...]
    numbers: Mapping[Tensor, int]


def parts_of(model: MultitaskModel, scope: str) -> ModelParts | None:
    """The parts of a scope that have a parameter which is trained; None where the model is one.

    Args:
        scope: "model"; "layer": embeddings, each layer of the encoder, pooler, shared layer; or "module": each module
            that has parameters of its own.
    """
    if scope == "model":
        return None
    shared = [] if model.shared is None else model.shared.named_parameters("shared")
    by_part: dict[str, list[Tensor]] = {}
    for name, param in (*model.encoder.named_parameters(), *shared):
        path = name.split(".")
        part = path[:-1] if scope == "module" else path[: 2 if path[0] == "layers" else 1]
        if param.requires_grad:
            by_part.setdefault(".".join(part), []).append(param)
    numbers = {param: number for number, params in enumerate(by_part.values()) for param in params}
    return ModelParts(tuple(by_part), numbers) if numbers else None
