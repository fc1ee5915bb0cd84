"""The light HookPoint: a named identity that user functions can watch and replace.

TransformerLens has the class that everybody knows, but importing it costs seconds and pulls in pandas, datasets
and transformers. This one has the same surface, so that TransformerLens models can address an SAE's
internals by name once it is spliced in (`sae_kit.hooked`), and needs torch alone. Without hooks an SAE never calls it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HookFunction = Callable[..., Tensor | None]
"""Called as `fn(tensor, hook=point)`; a tensor that it returns replaces the value (backward: the gradient)."""

Direction = Literal["fwd", "bwd"]


@dataclass(eq=False)
class HookRecord:
    """One attached function, with what is needed to find and remove it again."""

    hook: RemovableHandle
    is_permanent: bool = False
    context_level: int | None = None
    user_hook: HookFunction | None = None


class HookPoint(nn.Module):
    """Identity with hooks; interface of `transformer_lens.hook_points.HookPoint`."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None
        self.ctx: dict[str, Any] = {}
        self.fwd_hooks: list[HookRecord] = []
        self.bwd_hooks: list[HookRecord] = []
        self.hook_conversion = None
        self.backward_scale = 1.0
        self.pos_dim: int | None = None

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: Sequence[str] | None = None,
    ) -> HookRecord:
        """Attach `hook`; it is called once per name in `alias_names`, if given, with the point under that name."""

        def call(tensor: Tensor) -> Tensor | None:
            if alias_names is None:
                return hook(tensor, hook=self)
            result = None
            for name in alias_names:
                own, self.name = self.name, name
                try:
                    result = hook(tensor if result is None else result, hook=self)
                finally:
                    self.name = own
            return result

        def forward(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            return call(output)

        def backward(_module: nn.Module, _grads_in: Any, grads_out: Any) -> tuple[Tensor] | None:
            replacement = call(grads_out[0])
            return None if replacement is None else (replacement,)

        if dir == "fwd":
            handle = self.register_forward_hook(forward, prepend=prepend)
        else:
            handle = self.register_full_backward_hook(backward, prepend=prepend)
        record = HookRecord(handle, is_permanent, level, hook)
        records = self._records(dir)
        records.insert(0 if prepend else len(records), record)
        return record

    def add_perma_hook(self, hook: HookFunction, dir: Direction = "fwd") -> HookRecord:
        """Attach a hook that `remove_hooks` leaves in place unless told otherwise."""
        return self.add_hook(hook, dir=dir, is_permanent=True)

    def has_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Whether any hook of this direction and level is attached."""
        return any(
            (including_permanent or not record.is_permanent) and (level is None or record.context_level == level)
            for direction in _directions(dir)
            for record in self._records(direction)
        )

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Detach the hooks of this direction and level, permanent ones only if asked."""
        for direction in _directions(dir):
            kept = []
            for record in self._records(direction):
                if (including_permanent or not record.is_permanent) and (
                    level is None or record.context_level == level
                ):
                    record.hook.remove()
                else:
                    kept.append(record)
            self._records(direction)[:] = kept

    def clear_context(self) -> None:
        """Forget what hooks stored in `ctx`."""
        self.ctx = {}

    def layer(self) -> int:
        """Block number in the name of the site that the SAE is spliced into: `blocks.3.…` gives 3."""
        parts = (self.name or "").split(".")
        if len(parts) < 2 or not parts[1].isdigit():
            raise ValueError(f"hook point {self.name!r} is in no block")
        return int(parts[1])

    @property
    def is_listening(self) -> bool:
        """Whether anything hangs on this point, by whatever interface it was attached."""
        return bool(self._forward_hooks or self._backward_hooks or self._forward_pre_hooks or self._backward_pre_hooks)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def _records(self, dir: Direction) -> list[HookRecord]:
        return self.fwd_hooks if dir == "fwd" else self.bwd_hooks

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookPoint":
        # Handles point into the original: a copied SAE starts without hooks.
        return HookPoint()


def _directions(dir: str) -> tuple[Direction, ...]:
    return ("fwd", "bwd") if dir == "both" else ("fwd",) if dir == "fwd" else ("bwd",)
