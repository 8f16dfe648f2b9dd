"""Sizes of a transformer that fit each other."""

from w2s_train.errors import UserError, require


def check_sizes(sizes: dict[str, int], mlp_ratio: float, out_channels: int) -> None:
    """Refuse those that do not; see `DiT`.

    Raises:
        UserError: One that is not positive or does not divide another.
    """
    for name, value in sizes.items():
        require(name, value, "[1, inf)")
    require("mlp_ratio", mlp_ratio, "(0, inf)")
    for divisor, whole in (("patch_size", "input_size"), ("num_heads", "hidden_size")):
        if sizes[whole] % sizes[divisor]:
            raise UserError(f"{divisor}={sizes[divisor]}: must divide {whole}={sizes[whole]}")
    if sizes["hidden_size"] % 4:
        raise UserError(f"hidden_size={sizes['hidden_size']}: must be a multiple of 4")
    if out_channels < sizes["in_channels"]:
        raise UserError(
            f"out_channels={out_channels}: must be at least in_channels={sizes['in_channels']}"
        )
