"""An optimizer whose state is sharded across the processes (SOLVER.SHARDING optimizer: ZeRO, stage 1)."""

from typing import Any

from torch.distributed.optim import ZeroRedundancyOptimizer


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """torch's ZeRO, whose :meth:`state_dict` is that of the optimizer without it, and can be loaded by either.

    Each process updates whole tensors, about an equal share of the elements, and sends them to the others.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state of all processes, on the CPU; complete in the main process alone, but all must call it."""
        self.consolidate_state_dict(to=0)
        if self.rank:
            return {"state": {}, "param_groups": []}
        state = super().state_dict()
        self._all_state_dicts: list[dict[str, Any]] = []
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of a :meth:`state_dict`."""
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})  # which it changes
        self.state.clear()  # It keeps a copy there, beside that of the inner optimizer.
        for parameter, state in self.optim.state.items():
            # torch's ZeRO puts the count of steps on the CPU; fused optimizers want it beside the parameter.
            if "step" in state and self.optim.param_groups[0].get("fused"):
                state["step"] = state["step"].to(parameter.device)
