"""Forward passes that leave running statistics as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from minbert.model.layers import BatchNorm

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def statistics_kept(function: Any) -> Iterator[None]:
    """Run `function` inside without its passes entering the running statistics of any module that it calls.

    Modules in training normalise by the batch at hand all the same. They are BatchNorm, SyncBatchNorm, InstanceNorm and
    minbert's own BatchNorm, and spectral_norm, old and new, which takes no step of its power iteration. Modules are
    found as they are called, and inside those that are called or that `function` is.
    """
    kept = _Kept()
    try:
        if isinstance(function, nn.Module):
            kept.keep(function)
        if hasattr(function, "_orig_mod"):  # a compiled module, for which torch warns of global hooks
            yield
            return
        handle = register_module_forward_pre_hook(lambda module, inputs: kept.keep(module))
        try:
            yield
        finally:
            handle.remove()
    finally:
        kept.restore()


class _Kept:
    def __init__(self) -> None:
        self._seen: set[nn.Module] = set()
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []  # attributes, and what to put there again

    def keep(self, called: nn.Module) -> None:
        if called in self._seen:
            return
        for module in called.modules():
            if module in self._seen:
                continue
            self._seen.add(module)
            if isinstance(module, _NormBase) and module.training:
                # Without them torch normalises by the batch and tracks nothing.
                self._put(module._buffers, dict.fromkeys(_BUFFERS & module._buffers.keys()))
            elif isinstance(module, BatchNorm):
                self._put(vars(module), {"counts": False})
            elif isinstance(module, _SpectralNorm):
                self._put(vars(module), {"n_power_iterations": 0})
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, SpectralNorm):
                    self._put(vars(hook), {"n_power_iterations": 0})

    def _put(self, attributes: dict[str, Any], values: dict[str, Any]) -> None:
        self._before.append((attributes, {name: attributes[name] for name in values}))
        attributes.update(values)

    def restore(self) -> None:
        for attributes, values in reversed(self._before):
            attributes.update(values)
