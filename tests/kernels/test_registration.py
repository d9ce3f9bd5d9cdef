"""The ops are good citizens of torch: their registration is sound, and torch.compile takes them whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from minbert import kernels

SEED = torch.tensor([5, 70])
WEIGHTS = torch.tensor([0.5, -2.0], dtype=torch.float64)
GRAM = torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=torch.float64)
CU_SEQLENS = torch.tensor([0, 1, 4], dtype=torch.int32)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def leaf(*shape: int) -> torch.Tensor:
    return randn(*shape).requires_grad_()


def views(*shape: int) -> list[torch.Tensor]:
    """A parameter as one view for each of three tasks."""
    parameter = randn(*shape)
    return [parameter.detach().requires_grad_() for _ in range(3)]


BOUNDS = [0, 1, 1, 4]  # the second task has no rows
ROWS = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
FIRST_TOKENS = (CU_SEQLENS, 3, 0.3, SEED, 1, 0.5)
IDS = [torch.tensor([0, 2, 2, 1]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])]


TABLES = [randn(3, 9), randn(2, 9), randn(2, 9)]


def partly_sparse() -> tuple[list[torch.Tensor | None], list[torch.Tensor | None], list[int]]:
    """Gradients of two tasks: for the first tensor, rows of a matrix [4, 2], of which the second task has none."""
    return [randn(2, 2), None, randn(0, 2), randn(3)], [torch.tensor([0, 3]), None, torch.arange(0), None], [4, 0]


def packed_layers() -> kernels.PackedLayers:
    shapes = ((48, 16), (48,), (16, 16), (16,), (16,), (16,), (24, 16), (24,), (16, 24), (16,), (16,), (16,))
    layer = kernels.LayerParameters(*(randn(*shape) for shape in shapes))
    return kernels.PackedLayers([layer], heads=2, eps=1e-5, dtype=torch.float32)


CALLS = {
    "dropout_mask": lambda: (4, 9, 1 << 30, SEED, 1),
    "attention_dropout_mask": lambda: (torch.tensor([0, 5, 9], dtype=torch.int32), 3, 1 << 30, SEED, 1),
    "gram": lambda: (*partly_sparse(), 2),
    "combine_adamw_": lambda: (
        *partly_sparse(),
        WEIGHTS,
        *([randn(4, 2), randn(3)] for _ in range(4)),
        [torch.empty(0, dtype=torch.bfloat16), torch.empty(3, dtype=torch.bfloat16)],
        [torch.empty(0), torch.empty(0)],
        WEIGHTS[0],
        [0.99, 0.9, 0.999, 1e-8, 0.1, 0.5],
    ),
    "surgery_weights": lambda: (GRAM, torch.tensor([[0, 1], [1, 0]]), None, WEIGHTS[0], 0.1, True),
    "task_weights": lambda: (GRAM, "famo", [0.1, 0.001], WEIGHTS.abs(), None, None, torch.zeros(9).double()),
    "smart_init": lambda: (randn(4, 9), 0.1, SEED, 1),
    "smart_ascend": lambda: (*(randn(4, 9) for _ in range(3)), CU_SEQLENS, 0.1, 0.2, True, False, True),
    "dropout": lambda: (leaf(4, 9), 0.3, SEED, 1),
    "bias_gelu": lambda: (leaf(4, 9), views(9), BOUNDS),
    "bias_gelu_backward": lambda: (randn(4, 9), randn(4, 9), randn(9), BOUNDS),
    "first_token_attention": lambda: (leaf(2, 2, 8), leaf(4, 2, 2, 8), *FIRST_TOKENS),
    "first_token_attention_backward": lambda: (randn(2, 2, 8), randn(2, 2, 8), randn(4, 2, 2, 8), *FIRST_TOKENS),
    "dropout_add_layer_norm": lambda: (leaf(4, 9), leaf(4, 9), views(9), views(9), BOUNDS, 1e-5, 0.3, SEED, 1, ROWS),
    "dropout_add_layer_norm_backward": lambda: (
        *(randn(4, 9) for _ in range(3)),
        *(randn(9), randn(4, 2), BOUNDS, 0.3, SEED, 1, ROWS),
    ),
    "encoder_layers": lambda: (randn(4, 16), packed_layers().packed, CU_SEQLENS, *packed_layers().sizes, 3, True),
    "embedding": lambda: (
        IDS,
        *(views(3, 9), views(2, 9), views(2, 9), views(9), views(9)),
        *(BOUNDS, 1e-5, 0.3, SEED, 1, torch.bfloat16, False),
    ),
    "embedding_backward": lambda: (
        randn(4, 9),
        IDS,
        [randn(3, 9), randn(2, 9), randn(2, 9)],
        *(randn(9), randn(4, 2), BOUNDS, 0.3, SEED, 1, torch.tensor([0, 1, 1, 0]), [1, 0, 2]),
    ),
    "combine_": lambda: ([randn(4), None, randn(4), randn(3)], WEIGHTS, [torch.empty(4), torch.empty(3)]),
}


BY_PART = torch.stack([WEIGHTS, -WEIGHTS])
FIRST_COLUMNS = [0, 1, 2]  # of two parts of the model
CALLS_BY_PART = {
    "gram": lambda: (*CALLS["gram"](), FIRST_COLUMNS),
    "combine_": lambda: (CALLS["combine_"]()[0], BY_PART, [torch.empty(4), torch.empty(3)], FIRST_COLUMNS),
    "combine_adamw_": lambda: (*(BY_PART if x is WEIGHTS else x for x in CALLS["combine_adamw_"]()), FIRST_COLUMNS),
    "surgery_weights": lambda: (torch.stack([GRAM, 2 * GRAM]), None, BY_PART, WEIGHTS[0], 0.1, True),
}


def embed(*ids: torch.Tensor) -> torch.Tensor:
    return kernels.embedding(*ids, *TABLES, TABLES[0][0], TABLES[0][1], eps=1e-5)


def ascend(cu_seqlens: torch.Tensor) -> torch.Tensor:
    x = torch.ones(4, 9)
    return kernels.smart_ascend(x, x, x, cu_seqlens, eta=0.1, epsilon=0.2, per="sequence")


def project(orders: torch.Tensor) -> torch.Tensor:
    return kernels.surgery_weights(GRAM, orders=orders)[0]


def vaccinate(orders: torch.Tensor) -> torch.Tensor:
    return kernels.task_weights(GRAM, "gradvac", [0.5], orders=orders, state=torch.zeros(4).double())


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (embed, [torch.tensor([0, 3, 1, 1]), *IDS[1:]], "embedding: token_ids must lie in .* got 3"),
        (embed, [*IDS[:2], torch.tensor([-1, 0, 1, 1])], "embedding: position_ids must lie in .* got -1"),
        (ascend, [9 * CU_SEQLENS], "smart_ascend: cu_seqlens must end at the number of tokens, 4, got 36"),
        (project, [torch.tensor([[0, 9], [1, 0]])], r"surgery_weights: orders\[0\] must be a permutation"),
        (vaccinate, [torch.tensor([[0, 1], [1, -7]])], r"task_weights: orders\[1\] must be a permutation"),
    ],
)
def test_compiled_code_refuses_what_it_would_read_outside_a_tensor(
    function: Callable[..., torch.Tensor], arguments: list[torch.Tensor], message: str, needs_native: None
) -> None:
    with pytest.raises(ValueError, match=message):
        torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op: str, needs_native: None) -> None:
    torch.library.opcheck(getattr(torch.ops.minbert, op).default, CALLS[op]())


@pytest.mark.parametrize("op", CALLS_BY_PART)
def test_opcheck_by_parts_of_the_model(op: str, needs_native: None) -> None:
    torch.library.opcheck(getattr(torch.ops.minbert, op).default, CALLS_BY_PART[op]())


def surgery(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    grads = [[a, None, a], [b, b, None]]
    weights = kernels.gram(grads).sum(0)
    one, two, three = kernels.combine(grads, weights)
    return weights, one, two, three


def surgery_in_place(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    row = a.clone()
    return kernels.combine([[row], [b]], WEIGHTS, [row])[0] + row


def surgery_by_parts(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    grads, parts = [[a, None, a], [b, b, None]], [1, 0, 1]
    weights, stats = kernels.surgery_weights(kernels.gram(grads, parts), max_norm=1.0)
    state = [[tensor.abs() for tensor in (a, b, b)] for _ in range(3)]
    options = {"step": 1, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    kernels.combine_adamw_(state[0], grads, weights, state[1], state[2], parts=parts, **options)
    return weights, stats, *kernels.combine(grads, weights, parts=parts), *state[0]


def layer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    weight, bias = b[0], b[1]
    hidden = kernels.dropout_add_layer_norm(a, b, weight, bias, eps=1e-5, dropout_p=0.2, seed=SEED, stream_id=3)
    return kernels.dropout(kernels.bias_gelu(hidden, bias), p=0.2, seed=SEED[0], stream_id=4)


def first_tokens(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    queries, keys_values = a[:2].unflatten(1, (2, 8)), torch.stack((a, b), 1)[:4].unflatten(2, (2, 8))
    drop = {"dropout_p": 0.2, "seed": SEED, "stream_id": 3}
    context = kernels.first_token_attention(queries, keys_values, CU_SEQLENS, 3, **drop).flatten(1)
    rows = CU_SEQLENS[:-1]
    return kernels.dropout_add_layer_norm(context, a[:2], b[0], b[1], eps=1e-5, dropout_rows=rows, **drop)


def embedded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(6).repeat(2)
    drop = {"dropout_p": 0.2, "seed": SEED, "stream_id": 3, "dtype": torch.bfloat16}
    return kernels.embedding(ids, ids, ids, a, b, a, b[0], b[1], eps=1e-5, **drop)


def update(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    param, exp_avg, exp_avg_sq = a.clone(), torch.zeros_like(a), torch.zeros_like(a)
    kernels.adamw_([param], [b], [exp_avg], [exp_avg_sq], step=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    return param, exp_avg, exp_avg_sq


def fused_update(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    state = [a.clone(), torch.zeros_like(a), torch.zeros_like(a)]
    grads = [[a], [b]]
    copy = torch.zeros_like(a, dtype=torch.bfloat16)
    weights, stats = kernels.surgery_weights(kernels.gram(grads), orders=torch.tensor([[1, 0], [0, 1]]), max_norm=1.0)
    options = {"step": 1, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    more = {"copies": [copy], "skip_unless": stats[2]}
    kernels.combine_adamw_([state[0]], grads, weights, [state[1]], [state[2]], **options, **more)
    return stats, copy, *state


def split_update(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (high, low), param = kernels.split_float32(a), a.clone()
    state = [[torch.zeros_like(a), torch.zeros_like(a)] for _ in range(2)]
    options = {"step": 1, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    kernels.combine_adamw_([high, param], [[b, b]], WEIGHTS[:1], *state, low_bits=[low, None], **options)
    return high, low, param


def clipped(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return kernels.clip_weights(kernels.gram([[a], [b]]), WEIGHTS, 1.0)


def weighted(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    matrix, state = kernels.gram([[a], [b]]), a.new_zeros(3, dtype=torch.float64)
    weights = [kernels.task_weights(matrix, "nash-mtl", [1.0, 2], state=state) for _ in range(2)]
    orders, cosines = torch.tensor([[1, 0], [0, 1]]), a.new_zeros(4, dtype=torch.float64)
    vaccinated = kernels.task_weights(matrix, "gradvac", [0.5], orders=orders, state=cosines)
    return (*weights, state, vaccinated, cosines, kernels.task_weights(matrix, "upgrad", [1e-4]))


def ascent(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    start = kernels.smart_init(a, sigma=0.1, seed=SEED, stream_id=1)
    return kernels.smart_ascend(start, a, b, cu_seqlens, eta=0.1, epsilon=0.05, norm="2", per="sequence")


LAYERS = packed_layers()


def all_layers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return kernels.encoder_layers(a[:4] + b[:4], LAYERS, CU_SEQLENS, 3, first_tokens=True)


FUNCTIONS = [
    surgery,
    surgery_by_parts,
    surgery_in_place,
    layer,
    first_tokens,
    embedded,
    update,
    fused_update,
    split_update,
    clipped,
    weighted,
    ascent,
    all_layers,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_into_one_graph(function: Callable) -> None:
    a, b = randn(6, 16), randn(6, 16) + 1
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), function(a, b))


def test_compiles_into_one_graph_for_any_number_of_tokens() -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 9, 23):
        a, b = randn(tokens, 16), randn(tokens, 16) + 1
        torch.testing.assert_close(compiled(a, b), layer(a, b), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("function", [surgery, layer])
def test_compiles_with_the_default_backend(function: Callable) -> None:
    a, b = randn(6, 16), randn(6, 16) + 1
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(a, b), function(a, b))


@pytest.mark.parametrize("function", [layer, embedded])
def test_compiled_code_trains_with_the_same_masks(function: Callable) -> None:
    a, b = randn(6, 16).requires_grad_(), randn(6, 16) + 1
    compiled_function = torch.compile(function, fullgraph=True, backend="aot_eager")
    (eager,) = torch.autograd.grad(function(a, b).sum(), a)
    (compiled,) = torch.autograd.grad(compiled_function(a, b).sum(), a)
    torch.testing.assert_close(compiled, eager)
