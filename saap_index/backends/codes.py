"""Numbers that Python and compiled code agree on: columns, flags, dtypes. tests/test_codes.py compares them with the sources."""

from __future__ import annotations

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Storage types: bindings/dtypes.h, cuda/prims.cuh."""

BYTES_CODE = 3
"""Bytes, which are moved only: bindings/dtypes.h."""

LENGTH, SINKS, SEALED, SEGMENTS, NEXT, MEANS, RESERVED, FLAGS = range(8)
"""Columns of meta : int32 (b, 8): rows in use; sink rows; row past the last segment, 0 if there is none; segments; position of
the token that comes next; leading segments with run means; nothing; error flags. Without segments every row is recent."""

META = FLAGS + 1
"""Numbers of a sequence in meta."""

NOT_FINITE, FULL = 1, 2
"""Error flags: a key or value was not finite; a sequence had no room for its tokens."""
