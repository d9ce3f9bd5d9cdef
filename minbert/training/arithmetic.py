"""In which precision and by which library a run computes, where its options leave that open."""

from __future__ import annotations

import torch
from rich.console import Console

from minbert import kernels
from minbert.config import TrainConfig
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.methods.smart import rounds_away
from minbert.model import EncoderConfig, MultitaskModel


def fit_for_smart(model: MultitaskModel, config: TrainConfig, precision: str, console: Console) -> str:
    """Give the encoder a precision that does not round SMART's perturbations away, and return its name.

    A warning says so where --smart.precision allows none.
    """
    encoder, smart = model.encoder, config.smart
    length = rounds_away(model, smart, encoder.compute_dtype) if smart.on else None
    if length is None:
        return precision
    reason = f"--smart.{length} {getattr(smart, length):g} lies below what {precision} rounds the embeddings by"
    if precision == "bf16" and smart.precision == "auto":
        encoder.compute_dtype = torch.float32
        console.print(f"{reason}: the steps run in fp32 (--smart.precision same keeps {precision})")
        return "fp32"
    console.print(f"warning: {reason}: {smart.title} will do nothing")
    return precision


def choose_matmul(config: TrainConfig, encoder: EncoderConfig, group: ProcessGroup) -> str:
    """Choose the library of float32 products: on all ranks the one that is faster on the first. Returns its name.

    Raises:
        UserError: torch was built without the library that --matmul names.
    """
    name: str = config.matmul
    if name == "auto":
        measures = (
            group.is_main and group.device.type == "cpu" and (config.precision, config.backend) == ("fp32", "auto")
        )
        found = kernels.faster_matmul(encoder.hidden_size, encoder.intermediate_size) if measures else "blas"
        name = group.broadcast_object(found)
    try:
        kernels.set_matmul(name)
    except ValueError as error:
        raise UserError(f"--matmul {name}: {error}") from None
    return name
