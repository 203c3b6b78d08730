"""BatchNorm over parts of a batch against nn.BatchNorm2d, and its three ways to compute against float64."""

import copy
import importlib
from itertools import product

import pytest
import torch
from torch import nn

from modeling_moco import MoCoConfig, split_norm_moco
from modeling_moco.distributed_moco import convert_batch_norm
from training.benchmarks.measure import in_own_process

SPLITS, CHANNELS = 4, 3
SHAPES = {  # (N, C, H, W), groups
    "fewer channels than a tile": ((8, 3, 5, 4), 4),
    "more channels than a tile": ((16, 70, 9, 9), 2),
    "several parts in a group": ((4, 64, 24, 24), 2),
    "maps of one pixel": ((8, 64, 1, 1), 2),
}


@pytest.fixture
def plain():
    """A BatchNorm whose every tensor and setting differs from the default."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    return norm


def split(plain):
    norm = convert_batch_norm(
        nn.Sequential(copy.deepcopy(plain)), MoCoConfig(batch_norm="split", batch_norm_splits=SPLITS)
    )
    return norm[0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_split_batch_norm_is_batch_norm_on_each_part_of_the_batch(plain, memory_format):
    norm = split(plain)
    for _ in range(2):  # the second step starts from statistics that the first one left
        x = torch.randn(12, CHANNELS, 5, 4) * 3 + torch.arange(12.0).view(12, 1, 1, 1)
        x = x.to(memory_format=memory_format)
        direction = torch.randn(12, CHANNELS, 5, 4)
        x_split, x_oracle = (x.clone().requires_grad_() for _ in range(2))

        out = norm(x_split)
        groups = [copy.deepcopy(plain) for _ in range(SPLITS)]
        expected = torch.empty_like(x)
        for i, group in enumerate(groups):
            mine = slice(3 * i, 3 * i + 3)
            expected[mine] = group(x_oracle[mine])
        torch.testing.assert_close(out, expected)

        norm.zero_grad()
        (out * direction).sum().backward()
        (expected * direction).sum().backward()
        torch.testing.assert_close(x_split.grad, x_oracle.grad, atol=1e-5, rtol=1e-4)
        for name in ("weight", "bias"):
            total = sum(getattr(group, name).grad for group in groups)
            torch.testing.assert_close(getattr(norm, name).grad, total, atol=1e-4, rtol=1e-4)
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(group, name) for group in groups]).mean(dim=0)
            torch.testing.assert_close(getattr(norm, name), mean)
            getattr(plain, name).copy_(mean)
        plain.num_batches_tracked += 1
        assert norm.num_batches_tracked == plain.num_batches_tracked


def test_split_batch_norm_evaluates_as_batch_norm_whatever_the_batch(plain):
    x = torch.randn(SPLITS + 1, CHANNELS, 5, 4)
    norm = split(plain).eval()
    assert torch.equal(norm(x), plain.eval()(x))
    assert norm.num_batches_tracked == 0


def test_indivisible_batch_is_rejected(plain):
    with pytest.raises(ValueError, match=rf"\(6\).*batch_norm_splits \({SPLITS}\)"):
        split(plain)(torch.randn(6, CHANNELS, 5, 4))


def test_one_value_of_a_channel_is_rejected(plain):
    with pytest.raises(ValueError, match=rf"1 value of a channel at once: lower batch_norm_splits \({SPLITS}\)"):
        split(plain)(torch.randn(SPLITS, CHANNELS, 1, 1))


def results(way, shape, splits, dtype, device="cpu") -> dict[str, torch.Tensor]:
    """Output, gradients and running statistics of one way to compute, on the same numbers whatever the dtype."""
    torch.manual_seed(0)
    x = 3 * torch.randn(shape) + torch.arange(float(shape[0])).view(-1, 1, 1, 1)
    x += 100 * torch.rand(shape[1]).view(1, -1, 1, 1)  # channels far from 0 lose their variance in a sum of squares
    direction = torch.randn(shape).to(device)
    tensors = {name: torch.rand(shape[1]) + 0.5 for name in ("weight", "bias", "mean", "var")}
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    leaves = x.requires_grad_(), tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()
    out = way(*leaves, tensors["mean"], tensors["var"], splits, 0.3, 1e-3)
    out.backward(direction.to(dtype))
    gradients = dict(zip(("dx", "dweight", "dbias"), (leaf.grad for leaf in leaves), strict=True))
    found = {"out": out.detach(), **gradients, "mean": tensors["mean"], "var": tensors["var"]}
    return {name: tensor.double().cpu() for name, tensor in found.items()}


def errors_of_kernels() -> dict[str, float]:
    """Of the Triton kernels against float64: on a GPU where there is one, otherwise by Triton's interpreter."""
    kernels = importlib.reload(split_norm_moco)  # this process has TRITON_INTERPRET
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for name, (shape, splits) in SHAPES.items():
        ours = results(kernels.ByKernels.apply, shape, splits, torch.float32, device)
        exact = results(kernels.part_by_part, shape, splits, torch.float64)
        found |= {f"{key}, {name}": float((ours[key] - exact[key]).norm() / exact[key].norm()) for key in exact}
    return found


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_the_kernels_compile_for_a_gpu(dtype):
    # Triton's interpreter takes what its compiler refuses.
    pytest.importorskip("triton", reason="no Triton for this platform")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"x", "dy", "dx", "out"}
    kernels = "_sum_rows", "_finish_forward", "_finish_backward", "_normalise", "_gradient"
    fixed = {"forward": [True, False], "tile": [split_norm_moco.TILE], "padded": [128]}
    for kernel in (getattr(split_norm_moco, name) for name in kernels):
        names = kernel.arg_names
        types = {
            name: "constexpr" if name in fixed else _type_of(name, dtype if name in pointers else "*fp32")
            for name in names
        }
        for values in product(*(fixed[name] for name in names if name in fixed)):
            constants = dict(zip(((names.index(name),) for name in names if name in fixed), values, strict=True))
            source = ASTSource(kernel, types, constants)
            # As by default, but Triton 3.9 warns where nobody asks for it.
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
            assert len(compiled.asm["cubin"]) > 0


def _type_of(name: str, pointer: str) -> str:
    if name in ("values", "channels", "groups", "parts", "rows"):
        return "i32"
    return "fp32" if name in ("momentum", "eps") else pointer


@pytest.mark.slow
def test_the_kernels_equal_float64(monkeypatch):
    # The interpreter of Triton 3.6 asks NumPy for what 2.5 no longer does.
    oldest = None if torch.cuda.is_available() else "3.7"
    pytest.importorskip("triton", oldest, reason="no Triton for this platform, or too old an interpreter")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    errors = in_own_process(errors_of_kernels)
    assert len(errors) == 6 * len(SHAPES)
    assert {name: error for name, error in errors.items() if not error < 5e-6} == {}


@pytest.mark.parametrize("name", SHAPES)
def test_the_formula_for_torch_compile_equals_float64(name):
    shape, splits = SHAPES[name]
    ours = results(split_norm_moco.by_formula, shape, splits, torch.float32)
    for key, exact in results(split_norm_moco.part_by_part, shape, splits, torch.float64).items():
        assert (ours[key] - exact).norm() < 5e-6 * exact.norm(), key


@pytest.mark.parametrize("way", [split_norm_moco.part_by_part, split_norm_moco.by_formula])
def test_16_bits_stay_16_bits(way):
    x = torch.randn(8, 4, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    out = way(x, torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4), 2, 0.1, 1e-5)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out[:4].float().mean(dim=(0, 2, 3)).abs() < 0.01).all()
