"""Muon: momentum made orthogonal. The toy networks learn with it in half the time of AdamW; the papers use AdamW."""
import collections

import torch


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices and kernels, Adam for biases and gains [Jordan et al. 2024].

    All directions of a matrix learn at the same speed: the toy networks need half the time of AdamW. The update has
    the root mean square of Adam's, so AdamW's learning rates and weight decay hold [factor 0.2 sqrt(longer side),
    arXiv 2502.16982]. torch.optim.Muon takes two-dimensional parameters only.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, betas=(0.9, 0.95), weight_decay=0.01, matrices=True):
        defaults = dict(lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay, matrices=matrices)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2), alike = group["lr"], group["betas"], collections.defaultdict(list)
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                p.mul_(1 - lr * group["weight_decay"])
                if p.ndim > 1 and group["matrices"]:
                    m = state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                    alike[p.flatten(1).shape].append((p, p.grad.lerp(m, group["momentum"]).flatten(1)))       # Nesterov
                    continue
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                m, v = state["m"].lerp_(p.grad, 1 - beta1), state["v"].lerp_(p.grad.square(), 1 - beta2)
                p.addcdiv_(m / (1 - beta1 ** state["t"]), (v / (1 - beta2 ** state["t"])).sqrt_().add_(1e-8), value=-lr)
            for shape, pairs in alike.items():                    # matrices of one shape are made orthogonal together
                parameters, gradients = zip(*pairs)
                for p, direction in zip(parameters, orthogonalised(torch.stack(gradients))):
                    p.add_(direction.view_as(p), alpha=-0.2 * max(shape) ** 0.5 * lr)


def orthogonalised(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(B, m, n) -> about U V^T of each U S V^T: singular values end between 0.7 and 1.2 (Newton-Schulz, quintic)."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x.mT if tall else x
