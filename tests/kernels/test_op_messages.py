"""A wrong argument gives one line: the op, the argument, what was expected, what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from minbert import kernels
from minbert.kernels import (
    AttentionPlan,
    adamw_,
    attention,
    attention_dropout_mask,
    attention_plan,
    bias_gelu,
    clip_weights,
    combine,
    combine_adamw_,
    dropout,
    dropout_add_layer_norm,
    dropout_mask,
    embedding,
    gram,
    smart_ascend,
    smart_init,
    split_float32,
    surgery_weights,
    task_weights,
    weighting_state_size,
)

x, seed = torch.zeros(4, 6), torch.tensor(1)
qkv, cu = torch.zeros(9, 3, 2, 4), torch.tensor([0, 5, 9], dtype=torch.int32)
w64, gram2 = torch.ones(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
ids = torch.zeros(4, dtype=torch.int64)
vector = torch.zeros(6)
HALVES = split_float32(torch.zeros(3))  # a split parameter


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def embed(token_ids: torch.Tensor = ids, word: torch.Tensor = x, **options: object) -> torch.Tensor:
    return embedding(token_ids, ids, ids, word, x, x, vector, vector, eps=1e-5, **options)


def update(**changed: object) -> None:
    lists = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    options = {"step": 1, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    adamw_(**{**lists, **options, **changed})


def fused_update(weights: torch.Tensor = w64, **changed: object) -> None:
    state = {name: [torch.zeros(3)] for name in ("params", "exp_avgs", "exp_avg_sqs")}
    options = {"step": 1, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    grads = [[torch.zeros(3)], [None]]
    combine_adamw_(**{"grads": grads, **state, **options, **changed}, weights=weights)


def ascend(grad: torch.Tensor = x, cu_seqlens: torch.Tensor | None = None, **changed: object) -> None:
    options = {"eta": 0.1, "epsilon": 0.1}
    smart_ascend(x, x, grad, ints(0, 1, 4) if cu_seqlens is None else cu_seqlens, **{**options, **changed})


CASES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: gram([]), ValueError, "gram: grads must hold one list of tensors per task, got an empty list"),
    (lambda: gram([x, x]), TypeError, "gram: grads[0] must be a list of tensors, got a tensor; write [tensor]"),
    (lambda: gram([[x], [x, x]]), ValueError, "gram: every task needs as many tensors: grads[0] has 1, grads[1] 2"),
    (lambda: gram([[3]]), TypeError, "gram: grads[0][0] must be a tensor or None, got int"),
    (
        lambda: kernels.attention(torch.ones(4, 3, 2, 8), [0, 4], 4),
        TypeError,
        "attention: cu_seqlens must be a tensor, got list",
    ),
    (
        lambda: kernels.first_token_attention(torch.ones(1, 2, 8), torch.ones(4, 2, 2, 8), [0, 4], 4),
        TypeError,
        "first_token_attention: cu_seqlens must be a tensor, got list",
    ),
    (
        lambda: kernels.dropout_mask(4, 8, 0.1, 5, 0),
        TypeError,
        "dropout_mask: seed must be a tensor, got int",
    ),
    (
        lambda: kernels.attention_dropout_mask([0, 4], 2, 0.1, torch.tensor(5), 0),
        TypeError,
        "attention_dropout_mask: cu_seqlens must be a tensor, got list",
    ),
    (
        lambda: kernels.join_float32(x, x),
        TypeError,
        "join_float32: expected bfloat16 and int16, got torch.float32 and torch.float32",
    ),
    (
        lambda: gram([[x.half()]]),
        TypeError,
        "gram: grads[0][0] must be float32 or bfloat16 or float64, got float16",
    ),
    (
        lambda: gram([[x], [x.double()]]),
        TypeError,
        "gram: grads[1][0] must be float32 like its tensor in the other tasks, got float64",
    ),
    (
        lambda: gram([[x], [x[:2]]]),
        ValueError,
        "gram: grads[1][0] must have shape [4, 6] like its tensor in the other tasks, got [2, 6]",
    ),
    (
        lambda: gram([[x], [x.to("meta")]]),
        ValueError,
        "gram: grads[1][0] must be on cpu like its tensor in the other tasks, got meta",
    ),
    (
        lambda: gram([[x, x.to("meta")]]),
        ValueError,
        "gram: grads[0][1] must be on cpu like the other tensors, got meta",
    ),
    (
        lambda: gram([[x[:, ::2]]]),
        ValueError,
        "gram: grads[0][0] must be dense, got strides [6, 2] for shape [4, 3]; call .contiguous() on it",
    ),
    (
        lambda: gram([[torch.zeros(1, 6).expand(4, 6)]]),
        ValueError,
        "gram: grads[0][0] must be dense, got strides [0, 1] for shape [4, 6]; call .contiguous() on it",
    ),
    (
        lambda: gram([[x], [torch.zeros(6, 4).T]]),
        ValueError,
        "gram: grads[1][0] must be laid out like its tensor in the other tasks; call .contiguous() on both",
    ),
    (lambda: combine([[x], [x]], w64.float()), TypeError, "combine: weights must be float64, got float32"),
    (lambda: combine([[x]], w64), ValueError, "combine: weights must have shape [1], got [2]"),
    (
        lambda: combine([[x], [x]], w64.to("meta")),
        ValueError,
        "combine: weights must be on cpu like the gradients, got meta",
    ),
    (
        lambda: combine([[x], [x]], w64, []),
        ValueError,
        "combine: out must have one entry for each of the 1 tensors, got 0",
    ),
    (lambda: combine([[x], [x]], w64, [None]), TypeError, "combine: out[0] must be a tensor, got NoneType"),
    (
        lambda: combine([[x], [x]], w64, [x.bfloat16()]),
        TypeError,
        "combine: out[0] must be float32 like the gradients there, got bfloat16",
    ),
    (
        lambda: gram([[x, x]], [0]),
        ValueError,
        "gram: parts must have one number for each of the 2 tensors, got 1",
    ),
    (lambda: gram([[x, x]], [0, 2], 2), ValueError, "gram: parts[1] must be a number from 0 to 1, got 2"),
    (lambda: gram([[x, x]], [0, -1]), ValueError, "gram: parts[1] must be a number from 0 to 32767, got -1"),
    (lambda: gram([[x]], [0.5]), ValueError, "gram: parts[0] must be a number from 0 to 32767, got 0.5"),
    (lambda: gram([[]], [], 0), ValueError, "gram: there must be 1 to 32768 parts, got 0"),
    (lambda: gram([[x]], part_count=2), ValueError, "gram: part_count is given with parts, got 2 and None"),
    (
        lambda: combine([[x], [x]], w64, parts=[0]),
        ValueError,
        "combine: weights must have shape [G, 2], got [2]",
    ),
    (
        lambda: combine([[x], [x]], gram2),
        ValueError,
        "combine: weights must have shape [2], got [2, 2]",
    ),
    (
        lambda: fused_update(gram2, parts=[2]),
        ValueError,
        "combine_adamw_: parts[0] must be a number from 0 to 1, got 2",
    ),
    (
        lambda: surgery_weights(gram2[None], weights=w64),
        ValueError,
        "surgery_weights: weights must have shape [1, 2], got [2]",
    ),
    (
        lambda: surgery_weights(torch.ones(3, 2, 1, dtype=torch.float64)),
        ValueError,
        "surgery_weights: gram must have shape [3, 2, 2], got [3, 2, 1]",
    ),
    (
        lambda: surgery_weights(gram2[None], orders=torch.tensor([[[0, 1], [1, 1]]])),
        ValueError,
        "surgery_weights: orders[0, 1] must be a permutation of 0 to 1, got [1, 1]",
    ),
    (
        lambda: surgery_weights(torch.ones(2, 3, dtype=torch.float64)),
        ValueError,
        "surgery_weights: gram must have shape [2, 2], got [2, 3]",
    ),
    (
        lambda: surgery_weights(gram2, orders=torch.tensor([[0, 1], [1, 1]])),
        ValueError,
        "surgery_weights: orders[1] must be a permutation of 0 to 1, got [1, 1]",
    ),
    (
        lambda: surgery_weights(gram2, orders=gram2.long(), weights=w64),
        ValueError,
        "surgery_weights: orders and weights exclude each other, got both",
    ),
    (
        lambda: surgery_weights(gram2, weights=w64.float()),
        TypeError,
        "surgery_weights: weights must be float64, got float32",
    ),
    (
        lambda: surgery_weights(gram2, own_square=w64),
        ValueError,
        "surgery_weights: own_square must have shape [], got [2]",
    ),
    (
        lambda: surgery_weights(gram2, reduction="max"),
        ValueError,
        "surgery_weights: reduction must be one of 'sum', 'mean', got 'max'",
    ),
    (
        lambda: surgery_weights(gram2, max_norm=-1.0),
        ValueError,
        "surgery_weights: max_norm must be finite and at least 0, got -1.0",
    ),
    (
        lambda: task_weights(torch.ones(3, 2, 3, dtype=torch.float64), "mgda"),
        ValueError,
        "task_weights: gram must have shape [3, 3, 3], got [3, 2, 3]",
    ),
    (
        lambda: task_weights(torch.eye(17, dtype=torch.float64), "mgda"),
        ValueError,
        "task_weights: gram must be of at most 16 tasks, got 17",
    ),
    (
        lambda: weighting_state_size("famo", 17),
        ValueError,
        "weighting_state_size: tasks must be 1 to 16, got 17",
    ),
    (
        lambda: task_weights(gram2, "cagrad"),
        ValueError,
        "task_weights: options of cagrad must be 1 (c), got 0",
    ),
    (
        lambda: task_weights(gram2, "nash-mtl", [1.0, 0.5], state=torch.zeros(3).double()),
        ValueError,
        "task_weights: every of nash-mtl must be a whole number of at least 1, got 0.5",
    ),
    (
        lambda: task_weights(gram2, "famo", [0.1, 0.0], state=torch.zeros(9).double()),
        ValueError,
        "task_weights: famo needs losses",
    ),
    (
        lambda: task_weights(gram2, "mgda", losses=w64),
        ValueError,
        "task_weights: mgda takes no losses",
    ),
    (
        lambda: task_weights(gram2[None], "random", noise=w64),
        ValueError,
        "task_weights: noise must have shape [1, 2], got [2]",
    ),
    (
        lambda: task_weights(
            gram2, "gradvac", [0.5], orders=torch.tensor([[0, 0], [1, 0]]), state=torch.zeros(4).double()
        ),
        ValueError,
        "task_weights: orders[0] must be a permutation of 0 to 1, got [0, 0]",
    ),
    (
        lambda: task_weights(
            torch.stack([gram2, gram2]),
            "gradvac",
            [0.5],
            orders=torch.tensor([[[0, 1], [1, 0]], [[0, 0], [1, 0]]]),
            state=torch.zeros(2, 4).double(),
        ),
        ValueError,
        "task_weights: orders[1, 0] must be a permutation of 0 to 1, got [0, 0]",
    ),
    (
        lambda: update(copies=[torch.zeros(3)]),
        TypeError,
        "adamw_: copies[0] must be bfloat16, got float32",
    ),
    (
        lambda: update(low_bits=[torch.zeros(3, dtype=torch.int16)]),
        TypeError,
        "adamw_: params[0] must be bfloat16, got float32",
    ),
    (
        lambda: update(params=[HALVES[0]], low_bits=[torch.zeros(3, dtype=torch.int32)]),
        TypeError,
        "adamw_: low_bits[0] must be int16, got int32",
    ),
    (
        lambda: update(params=[HALVES[0]], exp_avgs=[HALVES[0]], low_bits=[HALVES[1]]),
        TypeError,
        "adamw_: exp_avgs[0] must be float32, got bfloat16",
    ),
    (
        lambda: update(params=[HALVES[0]], low_bits=[HALVES[1]], copies=[HALVES[0]]),
        ValueError,
        "adamw_: copies[0] must be None where low_bits are given: params[0] is bfloat16 itself",
    ),
    (
        lambda: fused_update(low_bits=[HALVES[1]]),
        TypeError,
        "combine_adamw_: params[0] must be bfloat16, got float32",
    ),
    (
        lambda: fused_update(params=[HALVES[0]], low_bits=[HALVES[1][:2]]),
        ValueError,
        "combine_adamw_: low_bits[0] must have shape [3], got [2]",
    ),
    (
        lambda: fused_update(params=[HALVES[0]], low_bits=[HALVES[1]], copies=[HALVES[0]]),
        ValueError,
        "combine_adamw_: copies[0] must be None where low_bits are given: params[0] is bfloat16 itself",
    ),
    (
        lambda: fused_update(
            params=[HALVES[0]],
            low_bits=[HALVES[1]],
            grads=[[torch.zeros(3).double()], [None]],
            exp_avgs=[torch.zeros(3).double()],
            exp_avg_sqs=[torch.zeros(3).double()],
        ),
        TypeError,
        "combine_adamw_: low_bits[0] must be None for float64 gradients, whose parameters have no split",
    ),
    (
        lambda: fused_update(copies=[]),
        ValueError,
        "combine_adamw_: the lists must be as long as each other, "
        "got grads 1, params 1, exp_avgs 1, exp_avg_sqs 1, copies 0",
    ),
    (
        lambda: fused_update(skip_unless=w64),
        ValueError,
        "combine_adamw_: skip_unless must have shape [], got [2]",
    ),
    (
        lambda: fused_update(skip_unless=w64[0].to("meta")),
        ValueError,
        "combine_adamw_: skip_unless must be on cpu like the other tensors, got meta",
    ),
    (
        lambda: dropout_mask(2, 3, 1.0, seed, 0),
        ValueError,
        "dropout_mask: the dropout probability must lie in [0, 1), got 1.0",
    ),
    (
        lambda: dropout_mask(2, 3, float("nan"), seed, 0),
        ValueError,
        "dropout_mask: the dropout probability must lie in [0, 1), got nan",
    ),
    (lambda: dropout_mask(2, 3, 0.5, seed.int(), 0), TypeError, "dropout_mask: seed must be int64, got int32"),
    (
        lambda: dropout_mask(2, 3, 0.5, ids, 0),
        ValueError,
        "dropout_mask: seed must have shape [] or, with the first row's number, [2]; got [4]",
    ),
    (lambda: dropout_mask(2, 3, 0.5, vector[:2], 0), TypeError, "dropout_mask: seed must be int64, got float32"),
    (
        lambda: dropout_mask(2, 3, 0.5, ids[::2], 0),
        ValueError,
        "dropout_mask: seed must be contiguous, got strides [2] for shape [2]; call .contiguous() on it",
    ),
    (lambda: smart_init(x, sigma=0.1, seed=3, stream_id=0), TypeError, "smart_init: seed must be a tensor, got int"),
    (
        lambda: dropout_mask(2, 3, 0.5, seed, -1),
        ValueError,
        "dropout_mask: stream_id must be a number from 0 to 2**32 - 1, got -1",
    ),
    (
        lambda: dropout_mask(0, 3, 0.5, seed, 0),
        ValueError,
        "dropout_mask: rows and columns must be at least 1, got 0 and 3",
    ),
    (
        lambda: attention_dropout_mask(cu, 0, 0.5, seed, 0),
        ValueError,
        "attention_dropout_mask: heads must be at least 1, got 0",
    ),
    (
        lambda: dropout(x, p=0.5, seed=None, stream_id=0),
        ValueError,
        "dropout: dropout with probability 0.5 needs a seed, an int64 tensor [] or [2]; got None",
    ),
    (
        lambda: dropout(x, p=0.5, seed=seed.to("meta"), stream_id=0),
        ValueError,
        "dropout: seed must be on cpu like the other tensors, got meta",
    ),
    (lambda: attention(qkv[:, 0], cu, 5), ValueError, "attention: qkv must have shape [N, 3, H, d], got [9, 2, 4]"),
    (
        lambda: attention(qkv[:0], cu, 5),
        ValueError,
        "attention: qkv must have shape [N, 3, H, d], got [0, 3, 2, 4] (no dimension may be 0)",
    ),
    (
        lambda: attention(qkv.long(), cu, 5),
        TypeError,
        "attention: qkv must be float32 or bfloat16 or float16 or float64, got int64",
    ),
    (
        lambda: attention(qkv.transpose(2, 3), cu, 5),
        ValueError,
        "attention: qkv must be contiguous in its last dimension, got strides [24, 8, 1, 4]; call .contiguous() on it",
    ),
    (lambda: attention(qkv, cu.long(), 5), TypeError, "attention: cu_seqlens must be int32, got int64"),
    (
        lambda: attention(qkv, cu[:1], 5),
        ValueError,
        "attention: cu_seqlens must have at least 2 entries (one sequence), got 1",
    ),
    (lambda: attention(qkv, ints(1, 9), 8), ValueError, "attention: cu_seqlens must start at 0, got 1"),
    (
        lambda: attention(qkv, ints(0, 8), 8),
        ValueError,
        "attention: cu_seqlens must end at the number of tokens, 9, got 8",
    ),
    (
        lambda: attention(qkv, ints(0, 7, 5, 9), 7),
        ValueError,
        "attention: cu_seqlens must increase, got 7 and then 5 at entries 1 and 2",
    ),
    (lambda: attention(qkv, cu, 4), ValueError, "attention: max_seqlen is 4, but the longest sequence has 5 tokens"),
    (
        lambda: attention(qkv, cu, 5, plan=AttentionPlan(torch.zeros(1, 3, dtype=torch.int32), ints(*[0] * 9))),
        ValueError,
        "attention: plan.tile_bounds must have shape [tiles, 2], got [1, 3]",
    ),
    (
        lambda: attention(qkv, cu, 5, plan=attention_plan(ints(0, 8), 8)),
        ValueError,
        "attention: plan.starts must have shape [9], got [8]",
    ),
    (
        lambda: dropout_add_layer_norm(x, x.double(), vector, vector, eps=1e-5),
        TypeError,
        "dropout_add_layer_norm: residual must be float32, got float64",
    ),
    (
        lambda: dropout_add_layer_norm(x, x, vector[:5], vector, eps=1e-5),
        ValueError,
        "dropout_add_layer_norm: weight must have shape [6], got [5]",
    ),
    (lambda: bias_gelu([1.0], vector), TypeError, "bias_gelu: x must be a tensor, got list"),
    (
        lambda: bias_gelu(x, vector.to("meta")),
        ValueError,
        "bias_gelu: bias must be on cpu like the other tensors, got meta",
    ),
    (lambda: embed(token_ids=ids + 4), ValueError, "embedding: token_ids must lie in [0, 3], the table's rows; got 4"),
    (lambda: embed(token_ids=ids - 1), ValueError, "embedding: token_ids must lie in [0, 3], the table's rows; got -1"),
    (lambda: embed(token_ids=ids.int()), TypeError, "embedding: token_ids must be int64, got int32"),
    (
        lambda: embed(dtype=torch.int64),
        TypeError,
        "embedding: dtype must be float32 or bfloat16 or float16 or float64, got int64",
    ),
    (
        lambda: embed(word=torch.zeros(4, 7)),
        ValueError,
        "embedding: token_type must have shape [types, 7], got [4, 6]",
    ),
    (
        lambda: update(grads=[]),
        ValueError,
        "adamw_: the lists must be as long as each other, got grads 0, params 1, exp_avgs 1, exp_avg_sqs 1",
    ),
    (lambda: update(step=0), ValueError, "adamw_: step is counted from 1, got 0"),
    (lambda: update(grads=[torch.zeros(2)]), ValueError, "adamw_: grads[0] must have shape [3], got [2]"),
    (
        lambda: update(exp_avgs=[torch.zeros(3, dtype=torch.float64)]),
        TypeError,
        "adamw_: exp_avgs[0] must be float32, got float64",
    ),
    (
        lambda: fused_update(params=[]),
        ValueError,
        "combine_adamw_: the lists must be as long as each other, got grads 1, params 0, exp_avgs 1, exp_avg_sqs 1",
    ),
    (lambda: fused_update(step=0), ValueError, "combine_adamw_: step is counted from 1, got 0"),
    (lambda: fused_update(w64[:1]), ValueError, "combine_adamw_: weights must have shape [2], got [1]"),
    (
        lambda: fused_update(w64.to("meta")),
        ValueError,
        "combine_adamw_: weights must be on cpu like the gradients, got meta",
    ),
    (
        lambda: fused_update(params=[torch.zeros(3).double()]),
        TypeError,
        "combine_adamw_: params[0] must be float32, got float64",
    ),
    (lambda: fused_update(params=[None]), TypeError, "combine_adamw_: params[0] must be a tensor, got NoneType"),
    (
        lambda: fused_update(exp_avgs=[torch.zeros(6)[::2]]),
        ValueError,
        "combine_adamw_: exp_avgs[0] must be laid out like the gradients there; call .contiguous() on both",
    ),
    (
        lambda: clip_weights(torch.zeros(2, 3).double(), w64, 1.0),
        ValueError,
        "clip_weights: gram must have shape [2, 2], got [2, 3]",
    ),
    (
        lambda: clip_weights(torch.zeros(2, 2).double(), w64, float("nan")),
        ValueError,
        "clip_weights: max_norm must be 0 or more, got nan",
    ),
    (
        lambda: smart_init(x, sigma=-1.0, seed=seed, stream_id=0),
        ValueError,
        "smart_init: sigma must be finite and at least 0, got -1.0",
    ),
    (
        lambda: smart_init(x, sigma=0.1, seed=seed, stream_id=2**32),
        ValueError,
        "smart_init: stream_id must be a number from 0 to 2**32 - 1, got 4294967296",
    ),
    (
        lambda: smart_init(x[0], sigma=0.1, seed=seed, stream_id=0),
        ValueError,
        "smart_init: x must have shape [N, D], got [6]",
    ),
    (lambda: ascend(x.bfloat16()), TypeError, "smart_ascend: grad must be float32, got bfloat16"),
    (lambda: ascend(x[:3]), ValueError, "smart_ascend: grad must have shape [4, 6], got [3, 6]"),
    (
        lambda: ascend(cu_seqlens=ints(0, 3)),
        ValueError,
        "smart_ascend: cu_seqlens must end at the number of tokens, 4, got 3",
    ),
    (
        lambda: ascend(cu_seqlens=ints(0, 4).to("meta")),
        ValueError,
        "smart_ascend: cu_seqlens must be on cpu, got meta",
    ),
    (
        lambda: ascend(eta=float("inf")),
        ValueError,
        "smart_ascend: eta must be finite and at least 0, got inf",
    ),
    (lambda: ascend(norm="1"), ValueError, "smart_ascend: norm must be one of 'inf', '2', got '1'"),
    (lambda: ascend(per="row"), ValueError, "smart_ascend: per must be one of 'token', 'sequence', got 'row'"),
    (
        lambda: ascend(projection="box"),
        ValueError,
        "smart_ascend: projection must be one of 'ball', 'unit', got 'box'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message for _, _, message in CASES])
def test_message(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
