"""Root-mean-square norm (Zhang and Sennrich 2019), computed in float32 row by row."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dim. `plus_one`: the checkpoint stores weight - 1 (Gemma), the sum is float32.

    `norm(x)` returns the normed x. `norm(x, residual)` first adds x to the residual and returns (normed sum, sum): the
    residual stream of a decoder. Neither argument is changed.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        plus_one: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.plus_one = plus_one
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=device), requires_grad=False)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return self._norm(x)
        total = x + residual
        return self._norm(total), total

    def _norm(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.plus_one:
            return wide.mul_(1.0 + self.weight.float()).to(x.dtype)
        # Rounded before the weight, as the models were trained.
        return wide.to(x.dtype).mul_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, plus_one={self.plus_one}"
