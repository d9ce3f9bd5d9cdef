"""Forward passes that do not update running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from minbert.model.layers import BatchNorm

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def frozen_running_statistics(function: Any) -> Iterator[None]:
    """A context in which calls of `function` do not update the running statistics of the modules that it calls.

    Modules in training still normalise by the batch. The modules are torch's BatchNorm, SyncBatchNorm and InstanceNorm,
    minbert's BatchNorm, and spectral_norm, old and new, whose power iteration is not continued. A module is found when
    it, a module around it, or `function` as a module is called.
    """
    seen: set[nn.Module] = set()
    with ExitStack() as stack:

        def replace(attributes: dict[str, Any], values: dict[str, Any]) -> None:
            stack.callback(attributes.update, {name: attributes[name] for name in values})
            attributes.update(values)

        def freeze(called: nn.Module, inputs: object = None) -> None:
            for module in () if called in seen else [*called.modules()]:
                if module in seen:
                    continue
                seen.add(module)
                if isinstance(module, _NormBase) and module.training:
                    # Without buffers, torch normalises by the batch.
                    replace(module._buffers, dict.fromkeys(_BUFFERS & module._buffers.keys()))
                elif isinstance(module, BatchNorm):
                    replace(vars(module), {"counts": False})
                spectral = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
                for norm in [*spectral, *([module] if isinstance(module, _SpectralNorm) else [])]:
                    replace(vars(norm), {"n_power_iterations": 0})

        if isinstance(function, nn.Module):
            freeze(function)
        if not hasattr(function, "_orig_mod"):  # torch warns of global hooks around a compiled module
            stack.callback(register_module_forward_pre_hook(freeze).remove)
        yield
