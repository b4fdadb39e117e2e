"""How methods say that data did not suffice."""

__all__ = ["CalibrationWarning"]


class CalibrationWarning(UserWarning):
    """The calibration did not suffice for a method; the message names the layer and what was done instead."""
