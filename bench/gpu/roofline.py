"""How fast an op can be: the bytes it has to move and the products it has to compute, against what a device can.

Every input is read once and every output written once; caches are not considered.
python bench/gpu/roofline.py prints floors of BERT-base's launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FLOAT32 = 4  # bytes: of parameters, of mean and rstd, and of their gradients


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches in the two simplest programs: a large copy, and a large product of bf16 matrices."""

    bandwidth: float  # bytes per second, read and written
    rate: float  # multiplications and additions per second


H100 = Ceilings(bandwidth=3.0e12, rate=790e12)  # as measured on the SXM model, of 3.35 TB/s and 989 TFLOP/s


@dataclass(frozen=True)
class Work:
    """What one launch has to do."""

    bytes: int
    operations: int = 0  # multiplications and additions of matrix products

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which no version of it can go, where nothing lies in a cache."""
        return max(self.bytes / ceilings.bandwidth, self.operations / ceilings.rate)


def floor(parts: Iterable[Work], ceilings: Ceilings) -> float:
    """Of launches one after the other."""
    return sum(part.floor(ceilings) for part in parts)


# The encoder's ops -----------------------------------------------------------------------------------------------


def attention(lengths: Sequence[int], heads: int, head_dim: int, *, backward: bool, itemsize: int = 2) -> Work:
    """Forward: qkv in, the result out. Backward: qkv and the result's gradient in, qkv's gradient out."""
    product = 2 * sum(n * n for n in lengths) * heads * head_dim
    tensors, products = (7, 5) if backward else (4, 2)
    return Work(tensors * sum(lengths) * heads * head_dim * itemsize, products * product)


def layer_norm(
    rows: int, columns: int, *, backward: bool, dropout: bool = True, tasks: int = 1, itemsize: int = 2
) -> Work:
    """Dropout, residual and LayerNorm; with dropout, x and the residual have different gradients."""
    mean_rstd = rows * 2 * FLOAT32
    params = 2 * columns * FLOAT32
    if not backward:
        return Work(3 * rows * columns * itemsize + mean_rstd + params)
    return Work((5 if dropout else 4) * rows * columns * itemsize + mean_rstd + (tasks + 1) * params)


def gelu(rows: int, columns: int, *, backward: bool, tasks: int = 1, itemsize: int = 2) -> Work:
    """Bias and GELU."""
    biases = tasks + 1 if backward else 1
    return Work((3 if backward else 2) * rows * columns * itemsize + biases * columns * FLOAT32)


def embedding(tokens: int, columns: int, table_rows: int, *, backward: bool, tasks: int = 1, itemsize: int = 2) -> Work:
    """The embedding block; backward writes dense gradients of all `table_rows` of the three tables for every task.

    Of the tables only the words are read: token types and positions stay in a cache.
    """
    words, result, ids = tokens * columns * FLOAT32, tokens * columns * itemsize, tokens * 3 * 8
    mean_rstd, params = tokens * 2 * FLOAT32, 2 * columns * FLOAT32
    tables = tasks * table_rows * columns * FLOAT32 if backward else 0
    return Work(words + result + ids + mean_rstd + params + tables)


def linear(rows: int, inputs: int, outputs: int, *, itemsize: int = 2) -> Work:
    """A product [rows, inputs] x [inputs, outputs]."""
    return Work((rows * inputs + inputs * outputs + rows * outputs) * itemsize, 2 * rows * inputs * outputs)


def weight_gradients(rows: int, inputs: int, outputs: int, *, tasks: int = 1, itemsize: int = 2) -> Work:
    """dY.T X for each task's rows, into a gradient of each task's own."""
    written = tasks * inputs * outputs * itemsize
    return Work(rows * (inputs + outputs) * itemsize + written, 2 * rows * inputs * outputs)


# The update and SMART --------------------------------------------------------------------------------------------


def gram(tasks: int, elements: int, *, itemsize: int = FLOAT32) -> Work:
    """One pass over T gradients."""
    return Work(tasks * elements * itemsize)


def combine_adamw(tasks: int, elements: int, *, itemsize: int = FLOAT32, copies: bool = False) -> Work:
    """T gradients in; parameters and both moments in and out; bf16 copies of the parameters out, if kept."""
    return Work(elements * (tasks * itemsize + 6 * FLOAT32 + (2 if copies else 0)))


def smart_init(rows: int, columns: int, *, itemsize: int = 2) -> Work:
    return Work(2 * rows * columns * itemsize)


def smart_ascend(rows: int, columns: int, *, itemsize: int = 2) -> Work:
    """The perturbed embeddings, the clean ones and the gradient in; the new perturbed embeddings out."""
    return Work(4 * rows * columns * itemsize)


# A training step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """Sizes of a BERT encoder; BERT-base as it stands."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    inner: int = 3072
    vocabulary: int = 30522
    positions: int = 512

    @property
    def table_rows(self) -> int:
        return self.vocabulary + self.positions + 2

    @property
    def parameters(self) -> int:
        norm, hidden, inner = 2 * self.hidden, self.hidden, self.inner
        layer = 4 * hidden * (hidden + 1) + norm + inner * (hidden + 1) + hidden * (inner + 1) + norm
        return self.table_rows * hidden + norm + self.layers * layer

    def products(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers."""
        return [
            (self.hidden, 3 * self.hidden),
            (self.hidden, self.hidden),
            (self.hidden, self.inner),
            (self.inner, self.hidden),
        ]


def step(
    encoder: Encoder, lengths: Sequence[int], *, rows: int, smart: bool, itemsize: int = 2
) -> dict[str, list[Work]]:
    """By component, the launches of a training step on sequences of these lengths; heads and losses not counted.

    Args:
        rows: separate gradients: 1 in a plain step, one for each task under gradient surgery.
        smart: whether SMART takes one ascent step: a perturbed forward, its backward down to the embeddings, and a
            forward at the point found, whose backward joins that of the clean pass.
    """
    tokens = sum(lengths)
    forwards, backwards, gradients = (3, 3, 2) if smart else (1, 1, 1)
    parts: dict[str, list[Work]] = {}

    def add(name: str, work: Work, times: int) -> None:
        parts.setdefault(name, []).extend([work] * times)

    for backward, passes in ((False, forwards), (True, backwards)):
        times = passes * encoder.layers
        for inputs, outputs in encoder.products():
            add("matrix products", linear(tokens, inputs, outputs, itemsize=itemsize), times)
        head_dim = encoder.hidden // encoder.heads
        add("attention", attention(lengths, encoder.heads, head_dim, backward=backward, itemsize=itemsize), times)
        norm = layer_norm(tokens, encoder.hidden, backward=backward, tasks=rows, itemsize=itemsize)
        add("dropout + residual + LayerNorm", norm, 2 * times)
        add("bias + GELU", gelu(tokens, encoder.inner, backward=backward, tasks=rows, itemsize=itemsize), times)
        sizes = tokens, encoder.hidden, encoder.table_rows
        add("embedding", embedding(*sizes, backward=backward, tasks=rows, itemsize=itemsize), 1)
    for inputs, outputs in encoder.products():
        sums = weight_gradients(tokens, inputs, outputs, tasks=rows, itemsize=itemsize)
        add("matrix products", sums, gradients * encoder.layers)
    if smart:
        add("SMART", smart_init(tokens, encoder.hidden, itemsize=itemsize), 1)
        add("SMART", smart_ascend(tokens, encoder.hidden, itemsize=itemsize), 1)
    # The gradients of the layers' matrices have the precision of the products, and all others float32.
    matrices = encoder.layers * sum(inputs * outputs for inputs, outputs in encoder.products())
    for elements, precision in ((matrices, itemsize), (encoder.parameters - matrices, FLOAT32)):
        add("update", gram(rows, elements, itemsize=precision), 1)
        add("update", combine_adamw(rows, elements, itemsize=precision, copies=elements == matrices), 1)
    return parts


def launches() -> dict[str, Work]:
    """By name, launches of BERT-base in bf16 that have a goal each."""
    base, found = Encoder(), {}
    rows, real = 8192, 2700  # tokens of a large batch, and of three tasks' batches of 32 real sequences
    head_dim = base.hidden // base.heads
    for backward, way in ((False, "forward"), (True, "backward")):
        for count, length in ((96, 28), (64, 128), (16, 512)):
            name = f"attention {way}, {count} sequences of {length}"
            found[name] = attention([length] * count, base.heads, head_dim, backward=backward)
        name = f"dropout + residual + LayerNorm {way}, {rows} x {base.hidden}"
        found[name] = layer_norm(rows, base.hidden, backward=backward)
        found[f"bias + GELU {way}, {rows} x {base.inner}"] = gelu(rows, base.inner, backward=backward)
    found[f"Gram matrix, 3 x {base.parameters / 1e6:.0f}M float32"] = gram(3, base.parameters)
    found[f"combine + AdamW, 3 x {base.parameters / 1e6:.0f}M float32"] = combine_adamw(3, base.parameters)
    found[f"smart_init, {real} x {base.hidden}"] = smart_init(real, base.hidden)
    found[f"smart_ascend, {real} x {base.hidden}"] = smart_ascend(real, base.hidden)
    return found


def table(ceilings: Ceilings = H100) -> str:
    """Floors in Markdown."""
    lines = ["| launch | MB moved | GFLOP | floor, us |", "|---|--:|--:|--:|"]
    for name, work in launches().items():
        products = f"{work.operations / 1e9:.1f}" if work.operations else ""
        lines.append(f"| {name} | {work.bytes / 1e6:.1f} | {products} | {1e6 * work.floor(ceilings):.1f} |")
    for name, rows, smart in (("plain", 1, False), ("PCGrad", 3, False), ("SMART + PCGrad", 3, True)):
        parts = [work for works in step(Encoder(), [28] * 96, rows=rows, smart=smart).values() for work in works]
        moved, operations = sum(part.bytes for part in parts), sum(part.operations for part in parts)
        least = 1e6 * floor(parts, ceilings)
        lines.append(f"| {name} step, 96 sequences of 28 | {moved / 1e6:.0f} | {operations / 1e9:.0f} | {least:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
