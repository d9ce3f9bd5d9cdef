"""One copy carries tensors of any dtype to the device, and one copy carries all numbers back."""

from __future__ import annotations

import torch

from minbert.training.host_device_copy import ALIGNMENT, Layout, Readback, copy_to_buffer


def test_one_buffer_holds_tensors_of_any_dtype_to_the_bit():
    tensors = [
        torch.arange(5),
        torch.tensor(2.5),
        torch.ones(3, 7, dtype=torch.bfloat16),
        torch.empty(0),
        torch.tensor([True]),
    ]
    layout = Layout(tensors)
    buffer = copy_to_buffer(tensors, layout, pinned=False)
    for view, tensor in zip(layout.views(buffer), tensors, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)
        assert (view.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0 or not tensor.numel()
    assert buffer.numel() == layout.size


def test_numbers_are_read_back_by_name():
    numbers = {
        "updated": [torch.tensor(1.0, dtype=torch.float64)],
        ("loss", "sst"): [torch.tensor(1.5, requires_grad=True), torch.tensor(2.5)],
        "gram": [torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)],
        ("loss", "sts"): [torch.tensor(-0.5, dtype=torch.bfloat16)],
        "perturbation": [torch.tensor([0.25, 0.75]), torch.tensor(8.0)],
    }
    found = Readback(numbers).read()
    assert list(found.items()) == [
        ("updated", [1.0]),
        (("loss", "sst"), [1.5, 2.5]),
        ("gram", [1.0, 2.0, 3.0, 4.0]),
        (("loss", "sts"), [-0.5]),
        ("perturbation", [0.25, 0.75, 8.0]),
    ]
