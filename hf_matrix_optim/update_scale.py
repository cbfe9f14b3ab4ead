"""Scale of a matrix update: the factor between a direction and the update that the learning rate multiplies."""

import math

UPDATE_SCALES = ("match_rms_adamw", "jordan")


def update_scale(fan_out: int, fan_in: int, *, rule: str = "match_rms_adamw", update_rms: float = 0.2) -> float:
    """Factor that turns a direction with orthonormal rows (columns if tall) into an update.

    ``match_rms_adamw`` is ``update_rms * sqrt(max(fan_out, fan_in))``: an orthonormal direction has root mean square
    ``1 / sqrt(max(fan_out, fan_in))``, so the update has root mean square ``update_rms`` whatever the shape, which is
    about that of an AdamW update; AdamW's learning rate and schedule carry over. ``jordan`` is
    ``sqrt(max(1, fan_out / fan_in))``; ``update_rms`` has no part in it.

    Args:
        fan_out: rows of the weight as ``nn.Linear`` stores it, at least 1.
        fan_in: columns, at least 1.
        rule: one of ``UPDATE_SCALES``.
        update_rms: root mean square of the update per unit of learning rate, above 0.

    Raises:
        ValueError: for a rule that is not in ``UPDATE_SCALES``.

    Source: Moonlight (arXiv 2502.16982), eq. 4, for ``match_rms_adamw``; K. Jordan's Muon for ``jordan``.
    """
    if rule == "match_rms_adamw":
        return update_rms * math.sqrt(max(fan_out, fan_in))
    if rule == "jordan":
        return math.sqrt(max(1.0, fan_out / fan_in))
    raise ValueError(f"update_scale={rule!r} is not one of {', '.join(UPDATE_SCALES)}")
