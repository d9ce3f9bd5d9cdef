"""The compiled ops of minbert, usable on their own: `from minbert.kernels import gram, combine, attention`.

Every op is stated in plain PyTorch in `minbert.kernels.reference`, and runs natively where native code exists for the
tensors' device (see `backends`). Each public function validates its arguments, chooses the backend and calls it.
"""

import sys

if __name__ == "minbert.kernels":
    from . import native, reference
    from .adamw import adamw_, combine_adamw_
    from .attention import attention
    from .attention_plan import AttentionPlan, attention_plan
    from .dispatch import BackendChoice, backends, set_backend, use_backend
    from .dropout import attention_dropout_mask, dropout, dropout_mask
    from .embedding import embedding
    from .encoder_layers import LayerParameters, PackedLayers, encoder_layers
    from .first_token_attention import first_token_attention
    from .gelu import bias_gelu
    from .gradient_accumulation import weight_gradients_added
    from .layer_norm import dropout_add_layer_norm
    from .linear import linear
    from .matmul_library import faster_matmul, matmul, set_matmul, use_matmul
    from .packed_weight import PackedWeight, pack_weight, weights_packed_once
    from .smart import smart_ascend, smart_init
    from .split_float32 import join_float32, split_float32
    from .surgery import clip_weights, combine, gram, surgery_weights
    from .weightings import WEIGHTING_RULES, task_weights, weighting_state_size
elif "transformers" not in sys.modules:  # it imports `kernels` to see whether that package is there; to it we are empty
    raise ImportError(
        f"this folder is the package minbert.kernels, not {__name__}: import minbert.kernels (and leave the "
        "repository's root out of PYTHONPATH if you meant another package of that name)"
    )

__all__ = [
    "WEIGHTING_RULES",
    "AttentionPlan",
    "BackendChoice",
    "LayerParameters",
    "PackedLayers",
    "PackedWeight",
    "adamw_",
    "attention",
    "attention_dropout_mask",
    "attention_plan",
    "backends",
    "bias_gelu",
    "clip_weights",
    "combine",
    "combine_adamw_",
    "dropout",
    "dropout_add_layer_norm",
    "dropout_mask",
    "embedding",
    "encoder_layers",
    "faster_matmul",
    "first_token_attention",
    "gram",
    "join_float32",
    "linear",
    "matmul",
    "native",
    "pack_weight",
    "reference",
    "set_backend",
    "set_matmul",
    "smart_ascend",
    "smart_init",
    "split_float32",
    "surgery_weights",
    "task_weights",
    "use_backend",
    "use_matmul",
    "weight_gradients_added",
    "weighting_state_size",
    "weights_packed_once",
]
