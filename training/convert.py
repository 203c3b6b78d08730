"""From the official names to ours."""

from .layouts import OFFICIAL, State, rename


def from_official(state_dict: State) -> State:
    """State dict of [`MoCoModel`] from the official names (`[module.]encoder_q.*`, `encoder_k.*`, `queue`, `queue_ptr`)."""
    renamed = {rename(name.removeprefix("module."), OFFICIAL): tensor for name, tensor in state_dict.items()}
    return {name: tensor for name, tensor in renamed.items() if name is not None}
