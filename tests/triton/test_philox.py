"""Random words inside Triton kernels are the reference's, to the bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from minbert.kernels import reference
from minbert.kernels.triton import philox


@triton.jit
def _words(out, seed, stream_id, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    word = philox.word(tl.load(seed), column // 4, row, 0, stream_id, column % 4)
    tl.store(out + row * columns + column, word.to(tl.int64), mask=column < columns)


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 7, -(2**62) + 3])
@pytest.mark.parametrize("stream_id", [0, 5, 2**32 - 1])
def test_words_are_the_references(device, seed, stream_id):
    rows, columns = 3, 21
    out = torch.full((rows, columns), -1, device=device)
    _words[(rows,)](out, torch.tensor(seed, device=device), stream_id, columns, BLOCK=32)
    group, row = torch.arange(6)[None], torch.arange(rows)[:, None]
    wanted = reference.philox((group, row, torch.zeros_like(row), torch.full_like(row, stream_id)), torch.tensor(seed))
    assert torch.equal(out.cpu(), torch.stack(wanted, dim=-1).reshape(rows, -1)[:, :columns])
