"""Fused AdamW on float32 master weights, with float32 gradient sums; the model's own weights are a copy in its dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019) for the trainable parameters of a model in any dtype.

    With dtype bfloat16 every trainable parameter keeps a float32 master (the loaded value, if that was float32) and
    itself becomes a copy in that dtype; its gradient is added to the master's float32 gradient as soon as a backward has
    made it, and freed. After an update the masters are cast into the model once. With float32 the parameters are their
    own masters. Matrices decay by `weight_decay`, norms and biases do not.
    """

    def __init__(self, net: nn.Module, *, dtype: torch.dtype, weight_decay: float):
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            self.masters[name] = p if dtype == torch.float32 else p.detach().float()
            p.data = p.data.to(dtype)  # only parameters: buffers such as rotary frequencies stay float32
        self._owned = [name for name, p in self.parameters.items() if self.masters[name] is not p]
        self._sums = {name: torch.zeros_like(self.masters[name]) for name in self._owned}
        for name in self._owned:
            self.parameters[name].register_post_accumulate_grad_hook(self._collector(name))
        groups: dict[float, list[Tensor]] = {weight_decay: []}
        for name, master in self.masters.items():
            decays = master.dim() > 1 and not name.endswith("bias")  # those of experts are stacked to a matrix
            groups.setdefault(weight_decay if decays else 0.0, []).append(master)
        self.adamw = torch.optim.AdamW(
            [{"params": p, "weight_decay": d} for d, p in groups.items() if p],
            lr=0.0, betas=BETAS, eps=EPSILON, fused=True,
        )  # fmt: skip

    def load_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Set the masters, from a checkpoint, and cast them into the model."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(weights[name])
        self._cast()

    def zero(self) -> None:
        """Forget the gradients. A parameter that takes no part in the step will have none, and is not updated."""
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients together, as a 0-d tensor."""
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def update(self, *, lr: float, divisor: Tensor | None = None, skip: Tensor | None = None) -> None:
        """One AdamW update with the gradients divided by `divisor` (0-d), then the masters are cast into the model.

        skip: a 0-d float tensor; where it is 1, nothing changes. Both stay on the device: nothing waits for it.
        """
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.grad_scale, self.adamw.found_inf = divisor, skip  # type: ignore[attr-defined]  # as a GradScaler would
        self.adamw.step()
        self._cast()

    def _cast(self) -> None:
        with torch.no_grad():
            for name in self._owned:
                self.parameters[name].copy_(self.masters[name])

    def _collector(self, name: str):  # type: ignore[no-untyped-def]
        def collect(parameter: Tensor) -> None:
            total = self._sums[name]  # kept from step to step: no allocation, no page faults
            if self.masters[name].grad is None:
                self.masters[name].grad = total.copy_(parameter.grad)  # type: ignore[arg-type]
            else:
                total.add_(parameter.grad)  # type: ignore[arg-type]
            parameter.grad = None

        return collect

    def state(self) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq of every parameter that has been updated, and the number of updates."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                found[f"{key}.{name}"] = value
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of `state`."""
        for name, master in self.masters.items():
            if f"exp_avg.{name}" in tensors:
                self.adamw.state[master] = {
                    key: tensors[f"{key}.{name}"].to(master.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
