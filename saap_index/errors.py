"""The named errors of the library: each says which argument, what was expected and what came.

Every class also derives from the built-in exception that a user of NumPy, torch or FAISS would catch.
"""


class SaapError(Exception):
    """Base class of every error that saap_index raises on purpose."""


class ShapeError(SaapError, ValueError):
    """An array has another number of axes, heads, dimensions or tokens than expected."""


class DTypeError(SaapError, TypeError):
    """An array has another element type than expected; nothing is cast silently."""


class DeviceError(SaapError, ValueError):
    """An array lies on another device than the index, or a device has no backend."""


class LayoutError(SaapError, ValueError):
    """The rows of an array are not contiguous in memory."""


class NotFiniteError(SaapError, ValueError):
    """Keys, values or queries contain NaN or infinity."""


class NotTrainedError(SaapError, RuntimeError):
    """The index needs its key quantizer (and router) first."""


class StateError(SaapError, RuntimeError):
    """The index is in a state in which this cannot be done, such as retraining one that holds tokens."""


class ParameterError(SaapError, ValueError):
    """A parameter lies outside its range, or two parameters contradict each other."""


class LengthError(SaapError, IndexError):
    """A position, a token count or an id lies outside what is stored."""


class FormatError(SaapError, ValueError):
    """A file is not an index of this version, or is damaged."""


class CompatibilityError(SaapError, ValueError):
    """Two parts do not belong together: another head shape, RoPE, or trained model."""


class MissingDependencyError(SaapError, ImportError):
    """An optional package is needed; the message says what to install."""
