"""A batch norm that trains with the layer it will be folded into; where such norms are found is `network.fuse.batch_norms`.

While it is live, the weight that is quantized is the folded one under the RUNNING statistics, w * gain / sqrt(var + eps), and the
layer's sums are brought to those of the BATCH, so that codes do not shake with every batch; once frozen, both are the running ones
(Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2). The batch's statistics are those of the quantized layer's own sums: one pass
through the layer and not two, and what is folded at the end is what inference meets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network.fuse import BatchNorm
from ..network.layer import divisor


class LiveNorm(nn.Module):
    """One layer's batch norm: ``gain`` and ``shift`` train, ``mean`` and ``var`` follow the batches by a share ``momentum`` each in
    training mode until `freeze`. A channel whose gain is 0 has no codes, and stays as it is.

    >>> norm = LiveNorm(BatchNorm("b", torch.ones(1, 3), None, torch.zeros(1), torch.ones(1), None, None, 1e-9), 0.5)
    >>> norm(torch.tensor([[1.0], [3.0]])).flatten().tolist(), norm.mean.item(), norm.var.item()
    ([-1.0, 1.0], 1.0, 1.5)
    """

    mean: Tensor
    var: Tensor
    frozen: Tensor
    extra: Tensor | None

    def __init__(self, norm: BatchNorm, momentum: float, bias: Tensor | None = None) -> None:
        """``bias``: what is folded now, where something else than folding moved it."""
        super().__init__()
        self.eps, self.momentum = norm.eps, momentum
        gain, shift = (torch.ones_like(norm.var) if norm.gain is None else norm.gain, norm.shift)
        shift = torch.zeros_like(norm.mean) if shift is None else shift
        self.gain = nn.Parameter(gain.detach().clone(), requires_grad=norm.gain is not None)
        self.shift = nn.Parameter(shift.detach().clone(), requires_grad=norm.shift is not None)
        self.register_buffer("mean", norm.mean.detach().clone())
        self.register_buffer("var", norm.var.detach().clone())
        self.register_buffer("extra", None if norm.bias is None else norm.bias.detach().clone(), persistent=False)
        self.register_buffer("frozen", torch.tensor(False))
        if bias is not None:
            with torch.no_grad():
                moved = bias - self.bias()
                self.shift.add_(torch.where(moved.abs() > 1e-6 * bias.abs().amax(), moved, torch.zeros(())))

    def extra_repr(self) -> str:
        return f"{len(self.mean)}, eps={self.eps}, momentum={self.momentum}" + (", frozen" if self.frozen else "")

    @property
    def shape(self) -> torch.Size:
        """Of the bias whose place it takes."""
        return self.mean.shape

    def freeze(self, on: bool = True) -> None:
        """Keep the statistics as they are from here on; gain and shift go on training."""
        self.frozen.fill_(on)

    def factor(self) -> Tensor:
        """What folding multiplies each output by, float64."""
        return self.gain.double() / (self.var.double() + self.eps).sqrt()

    def bias(self) -> Tensor:
        """What folding leaves as the layer's bias."""
        factor = self.factor()
        out = self.shift.double() - self.mean.double() * factor
        return (out if self.extra is None else out + self.extra.double() * factor).to(self.shift.dtype)

    def operand(self) -> Tensor | LiveNorm:
        """The folded bias; while the norm is live, itself."""
        return self if self.training and not bool(self.frozen) else self.bias()

    def forward(self, sums: Tensor) -> Tensor:
        """The norm's outputs of a layer's ``sums`` over folded weights, without a bias; channels are axis 1."""
        real = sums / divisor(self.factor()).to(sums.dtype).reshape(-1, *[1] * (sums.ndim - 2))
        real = real if self.extra is None else real + self.extra.reshape(-1, *[1] * (sums.ndim - 2))
        return F.batch_norm(real, self.mean, self.var, self.gain, self.shift, True, self.momentum, self.eps)
