"""4-bit layers as on either kind of CPU: bitsandbytes repacks their weights on CPUs with AVX512-BF16."""

import copy

import torch

CPUS = ["with AVX512-BF16", "without AVX512-BF16"]


def pretend_cpu(monkeypatch, kind: str):
    """Makes models load as on a CPU of this `kind`, one of `CPUS`."""
    from bitsandbytes import functional

    has_it = functional.has_avx512bf16()
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: kind == "with AVX512-BF16")
    if not has_it:
        monkeypatch.setattr(functional, "gemv_4bit", product_with_packed_weight)


@torch.no_grad()  # like the kernel, which has no gradients
def product_with_packed_weight(x, weight, out=None, state=None):
    """Replaces the kernel that exists only on CPUs with AVX512-BF16."""
    from bitsandbytes import functional

    weight, state = functional._convert_weight_packed_for_cpu_inverse(weight, copy.copy(state))
    return torch.nn.functional.linear(x, functional.dequantize_4bit(weight, state).to(x.dtype))
