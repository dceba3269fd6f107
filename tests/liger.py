"""Liger's kernels without a GPU: its modules and forwards are as they are, its Functions are made of torch's ops.

Like Liger's, they write in backward into what they were given and what they saved, unseen by version counters.
"""

import torch
import torch.nn.functional as F
from liger_kernel.transformers import functional, geglu, rms_norm, swiglu


def _rms_norm(x, weight, eps, offset, casting_mode):
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if casting_mode == "gemma":
        return (normed * (weight.float() + offset)).to(x.dtype)
    return (weight + offset) * normed.to(x.dtype)


def _gradients(function, inputs, gradient):
    with torch.enable_grad():
        inputs = [each.detach().requires_grad_() for each in inputs]
        return torch.autograd.grad(function(*inputs), inputs, gradient)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, casting_mode, in_place, row_mode):
        ctx.save_for_backward(x, weight)
        ctx.options, ctx.in_place = (eps, offset, casting_mode), in_place
        return _rms_norm(x, weight, *ctx.options)

    @staticmethod
    def backward(ctx, dy):
        dx, dweight = _gradients(lambda x, w: _rms_norm(x, w, *ctx.options), ctx.saved_tensors, dy)
        if ctx.in_place:
            dx = dy.data.copy_(dx)
        return dx, dweight, None, None, None, None, None


def _gated(name, activation):
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return activation(a) * b

    def backward(ctx, dz):
        a, b = ctx.saved_tensors
        da, db = _gradients(lambda a, b: activation(a) * b, (a, b), dz)
        return a.data.copy_(da), b.data.copy_(db)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


SiLUMul = _gated("SiLUMul", F.silu)
GELUMul = _gated("GELUMul", lambda a: F.gelu(a, approximate="tanh"))


def _swiglu(a, b, gate_multiplier=1.0, down_multiplier=1.0):
    return SiLUMul.apply(a, b)


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
        (rms_norm, "LigerRMSNormFunction", RMSNorm),
        (geglu, "LigerGELUMulFunction", GELUMul),
    ):
        emulated = type(name, (), {"apply": staticmethod(counted(name, function.apply))})
        monkeypatch.setattr(module, name, emulated)
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", counted("swiglu", _swiglu))
    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", counted("fused loss", _fused_loss))
