"""Liger's kernels without a GPU: its modules and forwards are as they are, its Functions are made of torch's ops."""

import torch
import torch.nn.functional as F
from liger_kernel.transformers import functional, geglu, rms_norm, swiglu


class _RMSNorm:
    @staticmethod
    def apply(x, weight, eps, offset, casting_mode, in_place, row_mode):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if casting_mode == "gemma":
            return (normed * (weight.float() + offset)).to(x.dtype)
        return (weight + offset) * normed.to(x.dtype)


class _GELUMul:
    @staticmethod
    def apply(a, b):
        return F.gelu(a, approximate="tanh") * b


def _swiglu(a, b, gate_multiplier=1.0, down_multiplier=1.0):
    return F.silu(a) * b


def _fused_loss(hidden, weight, target, reduction="mean", ignore_index=-100, **options):
    return F.cross_entropy(hidden @ weight.T, target, reduction=reduction, ignore_index=ignore_index)


def emulate(monkeypatch, calls):
    """Puts torch's ops in the place of Liger's kernels; `calls` lists the names of those that run."""

    def counted(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for module, name, function in (
        (rms_norm, "LigerRMSNormFunction", _RMSNorm),
        (geglu, "LigerGELUMulFunction", _GELUMul),
    ):
        emulated = type(name, (), {"apply": staticmethod(counted(name, function.apply))})
        monkeypatch.setattr(module, name, emulated)
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", counted("swiglu", _swiglu))
    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", counted("fused loss", _fused_loss))
