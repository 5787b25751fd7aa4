"""Native CPU kernels of saap_index; use saap_index.backends.cpu."""

from collections.abc import Sequence

class Quantizer:
    @property
    def shape(self) -> tuple: ...

class Router:
    @property
    def shape(self) -> tuple: ...

def append(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: Sequence[int],
    arg17: Sequence[int],
    /,
) -> bool: ...
def make_quantizer(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, /) -> Quantizer: ...
def assign(
    arg0: Quantizer,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: bool,
    arg10: float,
    arg11: int,
    /,
) -> None: ...
def seal(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    /,
) -> None: ...
def merge(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: Sequence[int],
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    /,
) -> None: ...
def encode(
    arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: int, arg6: int, arg7: int, arg8: int, arg9: int, /
) -> None: ...
def make_router(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    /,
) -> Router: ...
def route(
    arg0: Router,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: bool,
    arg10: float,
    arg11: int,
    arg12: int,
    /,
) -> None: ...
def means(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    /,
) -> None: ...
def probe_bound(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: Sequence[int], arg6: int, /) -> int: ...
def probe(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: bool,
    arg11: int,
    arg12: Sequence[int],
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: Sequence[int],
    arg17: int,
    arg18: int,
    arg19: int,
    arg20: int,
    arg21: int,
    arg22: int,
    arg23: int,
    arg24: int,
    arg25: int,
    arg26: int,
    /,
) -> tuple: ...
def scan(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: Sequence[int],
    arg16: Sequence[int],
    arg17: Sequence[int],
    arg18: float,
    arg19: bool,
    arg20: int,
    arg21: int,
    arg22: int,
    arg23: int,
    arg24: int,
    arg25: int,
    arg26: int,
    arg27: int,
    arg28: int,
    arg29: int,
    arg30: int,
    arg31: int,
    arg32: int,
    arg33: int,
    arg34: int,
    arg35: Sequence[int],
    arg36: Sequence[int],
    arg37: int,
    /,
) -> None: ...
def best(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: Sequence[int],
    arg14: Sequence[int],
    arg15: Sequence[int],
    arg16: int,
    arg17: int,
    arg18: int,
    /,
) -> None: ...

class SearchPlan:
    pass

def make_search(
    arg0: Router,
    arg1: int,
    arg2: bool,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: Sequence[int],
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: Sequence[int],
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    arg18: int,
    arg19: Sequence[int],
    arg20: Sequence[int],
    arg21: float,
    arg22: int,
    arg23: int,
    arg24: int,
    arg25: int,
    arg26: int,
    arg27: int,
    arg28: int,
    arg29: Sequence[int],
    arg30: Sequence[int],
    arg31: int,
    arg32: int,
    arg33: int,
    /,
) -> SearchPlan: ...
def search(
    arg0: SearchPlan,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: bool,
    arg9: float,
    arg10: Sequence[int],
    arg11: Sequence[int],
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    arg18: int,
    arg19: int,
    arg20: int,
    /,
) -> tuple: ...

class PageShape:
    def __init__(
        self,
        type: int,
        h: int,
        d: int,
        e: int,
        page: int,
        blocks: int,
        block_step: int,
        head_step: int,
        token_step: int,
        lists_block: int,
        lists_head: int,
    ) -> None: ...
    @property
    def row(self) -> int:
        """Elements that a row number counts."""

class Paged:
    def __init__(
        self, arg0: int, arg1: int, arg2: int, arg3: int, arg4: Sequence[int], arg5: int, arg6: Sequence[int], /
    ) -> None: ...

def write_pages(
    shape: PageShape,
    k: int,
    v: int,
    lists: int,
    keys: int,
    kn: int,
    kh: int,
    values: int,
    vn: int,
    vh: int,
    slots: int,
    n: int,
    quantizer: Quantizer | None,
    cos: int,
    sin: int,
    r: int,
    interleaved: bool,
    scale: float,
) -> None: ...
def count_pages(arg0: PageShape, arg1: int, arg2: Paged, arg3: int, arg4: int, /) -> None: ...
def find_pages(
    arg0: PageShape,
    arg1: int,
    arg2: Paged,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    /,
) -> None: ...
def scan_pages(
    arg0: PageShape,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: float,
    arg12: bool,
    arg13: int,
    arg14: int,
    arg15: int,
    /,
) -> None: ...
def search_pages(
    shape: PageShape,
    k: int,
    v: int,
    lists: int,
    paged: Paged,
    router: Router | None,
    first_knot: int,
    size_weighted: bool,
    cos: int,
    sin: int,
    r: int,
    interleaved: bool,
    turn: float,
    nprobe: int,
    budgets: int,
    unread_mass: int,
    sampled: int,
    exponents: int,
    caps: int,
    q: int,
    q_type: int,
    g: int,
    n_queries: int,
    scale: float,
    out: int,
    lse: int,
) -> int: ...
def combine(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: int, arg6: int, arg7: int, arg8: int, /) -> None: ...
def read_memory(address: int, bytes: int) -> int:
    """
    The sum of the words of memory, whole times 128 KiB: what a bare read costs.
    """

def read_bandwidth(bytes: int = 1073741824, repetitions: int = 5) -> list[float]:
    """
    GB/s at which all threads together read that much memory, one figure per repetition.
    """

def set_num_threads(threads: int) -> None:
    """Threads of the pool; 0: SAAP_NUM_THREADS, or what was suggested."""

def suggest_num_threads(threads: int) -> None:
    """Threads of the pool where nobody asked for a number."""

def get_num_threads() -> int: ...
def isa() -> str:
    """Instruction set in use."""

def isas() -> list[str]:
    """Instruction sets this processor can run, slowest first."""

def set_isa(name: str) -> None: ...
