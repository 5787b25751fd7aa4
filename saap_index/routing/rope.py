"""Rotary position embedding as plain data: the angles a model used, so that they can be undone.

Keys and queries reach the index after the model rotated them; routing wants them before. A rotation by a known angle is
exactly invertible, so `Rope` knows the angles and nothing else: no index, no cache, no device of its own.

RoPE (Su et al., arXiv 2104.09864) turns pair i of a token at position p by the angle p * f_i, f_i = theta ** (-2 i / r) for r
rotated dims. The scalings change f_i, some also the length of the pair. Angles are computed in float32 in the order of operations
of Hugging Face transformers: at position 100000 an error of one unit in the last place of f_i is an error of 0.006 in the angle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..backends.types import Frequencies, Rotation
from ..errors import DTypeError, FormatError, ParameterError, ShapeError
from . import positions as _positions
from .positions import Positions
from .rope_config import rope_options
from .rope_parameters import _OPTIONAL, _PARAMETERS, _POSITIVE, _REQUIRED, _boolean, _integer, _number, _positive, _yarn_magnitude

SeqLen: TypeAlias = "int | Sequence[int] | np.ndarray | None"
Length: TypeAlias = "int | tuple[int | None, ...] | None"


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one attention layer.

    head_dim : d. rotary_dim : r, even, <= d, the leading dims that are rotated; 0 means all of d. theta : the base.
    interleaved : pairs are dims (2i, 2i + 1) if True (GPT-J, Cohere, GLM), (i, i + r/2) if False (Llama).
    scaling : how the frequencies f_i differ from theta ** (-2 i / r), with its parameters:

    - "default": not at all.
    - "linear": f_i / factor (Chen et al., arXiv 2306.15595).
    - "dynamic": theta grows with the sequence beyond original_max_position, by factor (NTK-aware, see arXiv 2309.00071, 3.3).
    - "yarn": by wavelength between f_i and f_i / factor, the ramp from beta_fast (32) to beta_slow (1) turns within
      original_max_position, its ends rounded outwards if truncate (True); pairs grow by attention_factor
      (0.1 ln factor + 1) (Peng et al., arXiv 2309.00071).
    - "llama3": f_i / factor for wavelengths over original_max_position / low_freq_factor, f_i for those under
      original_max_position / high_freq_factor, smooth between (Llama 3.1).
    - "longrope": f_i / short_factor[i], or f_i / long_factor[i] if the sequence is longer than original_max_position; pairs
      grow by attention_factor (Ding et al., arXiv 2402.13753).

    Two Ropes are equal if they rotate alike by the same rule: defaults are filled in on construction.

    Raises ParameterError for a value outside its range, a missing parameter, or one that the scaling does not use.
    """

    head_dim: int
    theta: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = False
    scaling: str = "default"
    factor: float | None = None
    original_max_position: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    # The last results by key, replaced whole and never changed: results for the same key are equal, so a race only costs time.
    _memo: dict[str, tuple[Any, Any]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.scaling not in _REQUIRED:
            raise ParameterError(f"scaling: expected one of {sorted(_REQUIRED)}, got {self.scaling!r}")
        put("head_dim", _integer(self.head_dim, "head_dim", 2))
        put("rotary_dim", _integer(self.rotary_dim, "rotary_dim", 0) or self.head_dim)
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ParameterError(f"rotary_dim: expected an even number <= head_dim = {self.head_dim}, got {self.rotary_dim}")
        put("theta", _positive(self.theta, "theta"))
        put("interleaved", _boolean(self.interleaved, "interleaved"))

        for name in _REQUIRED[self.scaling]:
            if getattr(self, name) is None:
                raise ParameterError(f"{name}: expected a value, scaling {self.scaling!r} needs it, got None")
        for name in _PARAMETERS:
            if getattr(self, name) is not None and name not in _REQUIRED[self.scaling] + _OPTIONAL.get(self.scaling, ()):
                raise ParameterError(
                    f"{name}: expected None, scaling {self.scaling!r} does not use it, got {getattr(self, name)!r}"
                )
        for name in _POSITIVE:
            if getattr(self, name) is not None:
                put(name, _positive(getattr(self, name), name))
        if self.original_max_position is not None:
            put("original_max_position", _integer(self.original_max_position, "original_max_position", 1))
        if self.scaling == "dynamic":
            self._check_dynamic()
        elif self.scaling == "yarn":
            self._check_yarn(put)
        elif self.scaling == "llama3":
            self._check_llama3()
        elif self.scaling == "longrope":
            self._check_longrope(put)

    def _check_dynamic(self) -> None:
        if self.rotary_dim < 4:
            raise ParameterError(f"rotary_dim: expected at least 4 for scaling 'dynamic', got {self.rotary_dim}")
        if _number(self.factor) < 1:
            raise ParameterError(f"factor: expected at least 1 for scaling 'dynamic', got {self.factor}")

    def _check_yarn(self, put: Callable[[str, object], None]) -> None:
        if self.theta <= 1:
            raise ParameterError(f"theta: expected more than 1 for scaling 'yarn', got {self.theta}")
        put("beta_fast", 32.0 if self.beta_fast is None else self.beta_fast)
        put("beta_slow", 1.0 if self.beta_slow is None else self.beta_slow)
        put("truncate", True if self.truncate is None else _boolean(self.truncate, "truncate"))
        if self.attention_factor is None:
            put("attention_factor", _yarn_magnitude(_number(self.factor), 1.0))
        if _number(self.beta_fast) < _number(self.beta_slow):
            raise ParameterError(f"beta_fast: expected at least beta_slow = {self.beta_slow}, got {self.beta_fast}")

    def _check_llama3(self) -> None:
        if _number(self.high_freq_factor) <= _number(self.low_freq_factor):
            raise ParameterError(
                f"high_freq_factor: expected more than low_freq_factor = {self.low_freq_factor}, got {self.high_freq_factor}"
            )

    def _check_longrope(self, put: Callable[[str, object], None]) -> None:
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != self.rotary_dim // 2:
                raise ParameterError(f"{name}: expected {self.rotary_dim // 2} numbers (rotary_dim / 2), got {values!r}")
            put(name, tuple(_positive(value, name) for value in values))

    # -- angles --------------------------------------------------------------------------------------------------------

    @property
    def is_dynamic(self) -> bool:
        """Whether the angles depend on the length of the sequence when the rotation took place ("dynamic", "longrope").

        A cache of such a model may hold keys that were rotated by different frequencies; undo each with the length of its time.
        """
        return self.scaling in ("dynamic", "longrope")

    @property
    def attention_scale(self) -> float:
        """The factor by which rotation stretches the rotated dims (transformers multiplies cos and sin by it); 1 for most."""
        return 1.0 if self.attention_factor is None else self.attention_factor

    def inv_freq(self, seq_len: int | None = None) -> Tensor:
        """Radians per position of each pair: a new float32 (r / 2) tensor on the CPU.

        seq_len : tokens of the sequence, counting the newest, when the rotation takes place; used if `is_dynamic`. None: a
        sequence of at most original_max_position tokens. Raises ParameterError if it is negative.
        """
        return self._inv_freq(self._effective_length(seq_len))

    def _effective_length(self, seq_len: int | None) -> int | None:
        """What of ``seq_len`` the frequencies depend on; None for the unscaled ones."""
        if seq_len is None or not self.is_dynamic:
            return None
        original = self.original_max_position
        assert original is not None
        if _integer(seq_len, "seq_len", 0) <= original:
            return None
        return int(seq_len) if self.scaling == "dynamic" else original + 1

    def _inv_freq(self, length: int | None) -> Tensor:
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim
        if self.scaling == "dynamic" and length is not None:
            return 1.0 / self._dynamic_theta(length) ** exponent
        powers: Tensor = self.theta**exponent
        if self.scaling == "linear":
            return (1.0 / powers) / _number(self.factor)
        if self.scaling == "yarn":
            return self._yarn(powers)
        if self.scaling == "llama3":
            return self._llama3(1.0 / powers)
        if self.scaling == "longrope":
            stretch = self.short_factor if length is None else self.long_factor
            return 1.0 / (torch.tensor(stretch, dtype=torch.float32, device="cpu") * powers)
        return 1.0 / powers

    def _dynamic_theta(self, length: int) -> Tensor:
        """NTK-aware base of a sequence of ``length`` tokens; in float32, for the model holds the length in a tensor."""
        factor, original, r = _number(self.factor), _number(self.original_max_position), self.rotary_dim
        growth: Tensor = factor * torch.tensor(length, dtype=torch.float32, device="cpu") / original - (factor - 1.0)
        return self.theta * growth ** (r / (r - 2))

    def _yarn(self, powers: Tensor) -> Tensor:
        """YaRN's blend, arXiv 2309.00071 section 3.2, over the index of a pair instead of its wavelength."""
        factor, original, r = _number(self.factor), _number(self.original_max_position), self.rotary_dim

        def pair_of(turns: float) -> float:
            """The (real) index of the pair that makes ``turns`` turns within the original length."""
            return r * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = pair_of(_number(self.beta_fast)), pair_of(_number(self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, r - 1)
        if first == last:
            last += 0.001
        keep = 1 - ((torch.arange(r // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
        return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep

    def _llama3(self, plain: Tensor) -> Tensor:
        factor, original = _number(self.factor), _number(self.original_max_position)
        low, high = _number(self.low_freq_factor), _number(self.high_freq_factor)
        wavelength = 2 * math.pi / plain
        smooth = (original / wavelength - low) / (high - low)
        between = (1 - smooth) * plain / factor + smooth * plain
        slow = torch.where(wavelength > original / low, plain / factor, between)
        return torch.where(wavelength < original / high, plain, slow)

    def _frequencies(self, length: int | None, device: torch.device) -> Tensor:
        """float32 (r / 2) on ``device``, kept for the next call."""
        held = self._memo.get("frequencies")
        if held is None or held[0] != (length, device):
            held = (length, device), self._inv_freq(length).to(device)
            self._memo["frequencies"] = held
        result: Tensor = held[1]
        return result

    def _angles(self, positions: Tensor, length: Length) -> tuple[Tensor, Tensor]:
        """cos, sin : float32 (..., r / 2) of int positions (...)."""
        if isinstance(length, tuple):
            kinds = {one: number for number, one in enumerate(dict.fromkeys(length))}
            each = torch.tensor([kinds[one] for one in length], dtype=torch.int64, device=positions.device)
            frequencies = torch.stack([self._inv_freq(one) for one in kinds]).to(positions.device)[each]
        else:
            frequencies = self._frequencies(length, positions.device)
        angles = positions.to(torch.float32)[..., None] * frequencies
        return angles.cos(), angles.sin_()

    def _length_of_rotation(self, seq_len: SeqLen, count: int | None = None) -> Length:
        """What of ``seq_len`` the frequencies depend on, one for all tokens or a tuple of ``count``, one for each."""
        if seq_len is None and self.is_dynamic:
            raise ParameterError(f"seq_len: expected the sequence length at the time of rotation for {self.scaling!r}, got None")
        if not isinstance(seq_len, Sequence | np.ndarray) or isinstance(seq_len, str):
            return self._effective_length(seq_len)  # type: ignore[arg-type]
        if len(seq_len) != count:
            raise ShapeError(f"seq_len: expected one for each of {count} positions, got {len(seq_len)}")
        each = tuple(map(self.effective_length, seq_len)) if self.is_dynamic else ()
        if len(set(each)) > 1:
            return tuple(one or None for one in each)
        return (each[0] or None) if each else None

    def effective_length(self, seq_len: int) -> int:
        """A length whose frequencies are those of ``seq_len``, the same for all that share them; 0 for the unscaled ones."""
        return self._effective_length(seq_len) or 0

    def rotation(self, positions: Positions, seq_len: SeqLen = None, *, device: torch.device | str | None = None) -> Rotation:
        """The angles that undo this embedding for n tokens, as a backend takes them.

        positions : integers (n,), a torch tensor, NumPy array, sequence or range. seq_len : as in `inv_freq`, but needed if
        `is_dynamic`; for all, or n of them, one for each. device : of the result; None: the positions' own if they are a tensor,
        else the CPU.

        Returns cos, sin : float32 (n, r / 2) and scale = 1 / attention_scale. Do not write to them: the result of the last call
        is kept for the layers that ask the same (for up to 256 positions that are not on an accelerator).

        Raises DTypeError or ShapeError for positions that are not a vector of integers, ParameterError for seq_len.

            >>> rope = Rope(head_dim=4, theta=100.0)
            >>> rope.rotation(range(2, 4)).cos.shape
            torch.Size([2, 2])
        """
        request = (positions, seq_len, device) if isinstance(positions, range) and isinstance(seq_len, int | None) else None
        last = self._memo.get("asked")
        if request is not None and last is not None and last[0] == request:  # the other layers of a decode step
            return last[1]
        length = self._length_of_rotation(seq_len, _positions.count(positions))
        place = _positions.place(positions, device)
        content = _positions.content(positions)
        key = None if content is None else (content, length, place)
        held = self._memo.get("rotation")
        if key is not None and held is not None and held[0] == key:
            result: Rotation = held[1]
            return result
        if content is not None and len(content) == 1 and place.type == "cpu" and not isinstance(length, tuple):
            # a decode step: NumPy multiplies in half the time
            angles = torch.from_numpy(self._frequencies(length, place).numpy()[None] * np.float32(content[0]))
            cos, sin = angles.cos(), angles.sin_()
        else:
            vector = _positions.integers(positions, place)
            if vector.ndim != 1:
                raise ShapeError(f"positions: expected shape (n,), got {tuple(vector.shape)}")
            cos, sin = self._angles(vector, length)
        result = Rotation(cos, sin, self.interleaved, 1.0 / self.attention_scale)
        if key is not None:
            self._memo["rotation"] = key, result
            if request is not None:
                self._memo["asked"] = request, result
        return result

    def frequencies(self, device: torch.device | str) -> Frequencies:
        """What undoes this embedding wherever a token is. ParameterError if `is_dynamic`. Do not write to it."""
        held = self._memo.get("shared")
        if held is None or held[0] != device:
            length = self._length_of_rotation(None)
            assert not isinstance(length, tuple), "one for all tokens"
            inv_freq = self._frequencies(length, torch.device(device))
            held = device, Frequencies(inv_freq, self.interleaved, 1.0 / self.attention_scale)
            self._memo["shared"] = held
        shared: Frequencies = held[1]
        return shared

    # -- applying ------------------------------------------------------------------------------------------------------

    def rotate(self, x: Tensor, positions: Positions, seq_len: SeqLen = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """What the model does to queries and keys: (x, y) -> attention_scale * (x cos - y sin, y cos + x sin) for each pair.

        x : any float dtype (..., n, d), left as it is. positions : integers (n,), or (b, n) for x (b, ..., n, d); 1 broadcasts.
        seq_len : as in `rotation`. dtype : of the result; None: x's. Computed in float32; dims from r on pass through.

        Raises DTypeError or ShapeError if x or positions are none of this, ParameterError for seq_len.
        """
        return self._turn(x, positions, seq_len, dtype, 1.0, self.attention_scale)

    def unrotate(
        self, x: Tensor, positions: Positions, seq_len: SeqLen = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The inverse of `rotate`, with the same arguments: (x, y) -> (x cos + y sin, y cos - x sin) / attention_scale."""
        return self._turn(x, positions, seq_len, dtype, -1.0, 1.0 / self.attention_scale)

    def _turn(
        self, x: Tensor, positions: Positions, seq_len: SeqLen, dtype: torch.dtype | None, sign: float, scale: float
    ) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise DTypeError(f"x: expected a torch tensor of a float dtype, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim < 2 or x.shape[-1] != self.head_dim:
            raise ShapeError(f"x: expected shape (..., n, {self.head_dim}), got {tuple(x.shape)}")
        vector = _positions.integers(positions, x.device)
        fits = 1 <= vector.ndim <= min(2, x.ndim - 1) and vector.shape[-1] in (1, x.shape[-2])
        if not fits or (vector.ndim == 2 and vector.shape[0] not in (1, x.shape[0])):
            raise ShapeError(f"positions: expected shape (n,) or (b, n) for x {tuple(x.shape)}, got {tuple(vector.shape)}")
        cos, sin = self._angles(vector, self._length_of_rotation(seq_len, vector.shape[-1]))
        if vector.ndim == 2:
            between = (1,) * (x.ndim - 3)
            cos, sin = (part.reshape(part.shape[0], *between, *part.shape[1:]) for part in (cos, sin))
        cos, sin = cos * scale, sin * (sign * scale)

        r = self.rotary_dim
        firsts, seconds = (slice(0, r, 2), slice(1, r, 2)) if self.interleaved else (slice(0, r // 2), slice(r // 2, r))
        source = x.to(torch.float32)
        first, second = source[..., firsts], source[..., seconds]
        result = source.clone()
        result[..., firsts] = first * cos - second * sin
        result[..., seconds] = second * cos + first * sin
        return result.to(x.dtype if dtype is None else dtype)

    # -- plain data ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, those that are None left out; `from_dict` gives an equal Rope."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rope:
        """The inverse of `to_dict`.

        Raises FormatError if ``data`` is no mapping, lacks head_dim or has an unknown entry; ParameterError as the class does.
        """
        if not isinstance(data, Mapping):
            raise FormatError(f"rope: expected a mapping, got {type(data).__name__}")
        names = [f.name for f in fields(cls) if f.init]
        unknown = [name for name in data if name not in names]
        if unknown or "head_dim" not in data:
            raise FormatError(f"rope: expected head_dim and others of {names}, got {list(data)}")
        return cls(**data)

    @classmethod
    def from_config(
        cls, config: Any, layer_type: str | None = None, *, layer: int | None = None, interleaved: bool | None = None
    ) -> Rope | None:
        """The embedding of a layer of a Hugging Face model; None for a layer that the model leaves without rotation.

        config : a transformers config (of a multimodal model: its text_config is read), or the dict of a config.json; either with
        rope_parameters (transformers 5) or with rope_theta and rope_scaling. layer_type : such as "full_attention", or layer :
        the number of the layer; one of them is needed if the layers differ. interleaved : overrides what is known of
        config.model_type; a model type unknown here is taken for half-split, which nearly all are.

        Raises CompatibilityError, naming the rope type or the family, if the rotation is of another kind (multimodal sections,
        latent attention with rotary dims of its own, a family with its own rule, a scaling or parameter not known here), or if
        the config states no RoPE at all; ParameterError if layer_type is missing or unknown, or a value is outside its range.
        """
        options = rope_options(config, layer_type, layer, interleaved)
        return None if options is None else cls(**options)
