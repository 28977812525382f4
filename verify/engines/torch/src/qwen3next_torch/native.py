"""The C library: its args structs, and calls cut over torch's own threads. Field by field as in csrc/*/<op>.h."""

import ctypes
import pathlib
import sys

import torch

_FOLDER = pathlib.Path(__file__).parent
_SUFFIX = {"darwin": ".dylib"}.get(sys.platform, ".so")
_LIBRARY = ctypes.CDLL(str(_FOLDER / f"libq3n{_SUFFIX}"))
_RANGES = ctypes.CDLL(str(_FOLDER / "libq3n_ranges.so")).q3n_ranges

ABI_VERSION = 2
_POINTER, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _fields(text):
    """'o state_out: pointer' lines, in order."""
    types = {"pointer": _POINTER, "i64": _I64, "i32": _I32, "f32": _F32, "u64": ctypes.c_uint64}
    return [(name, types[kind.strip()]) for line in text.strip().splitlines() for names, kind in [line.split(":")] for name in names.split()]


class GatedDeltaArgs(ctypes.Structure):
    _fields_ = _fields(
        """
        struct_bytes: u64
        o state_out snapshots q k v g beta state_in slot_in slot_out cu_seqlens: pointer
        gate head_map qk_l2norm: i32
        qk_l2norm_eps scale: f32
        o_b o_t o_h q_b q_t q_h k_b k_t k_h v_b v_t v_h g_b g_t g_h beta_b beta_t beta_h: i64
        state_slot state_h state_v snap_b snap_t snap_h snap_v slots B T HK HV K V: i64
        """
    )


class CausalConvArgs(ctypes.Structure):
    _fields_ = _fields(
        """
        struct_bytes: u64
        y state_out snapshots x w bias state_in slot_in slot_out cu_seqlens: pointer
        silu: i32
        y_b y_t x_b x_t w_c state_slot state_c snap_b snap_t snap_c slots B T C width: i64
        """
    )


class NormArgs(ctypes.Structure):
    _fields_ = _fields(
        """
        struct_bytes: u64
        y x w z: pointer
        kind: i32
        eps: f32
        y_t y_h x_t x_h z_t z_h T H D: i64
        """
    )


class Variant(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("isa", _I32),
        ("items", ctypes.CFUNCTYPE(_I64, _POINTER)),
        ("scratch_bytes", ctypes.CFUNCTYPE(_I64, _POINTER)),
        ("run", _POINTER),
    ]


ARGS = {"gated_delta": GatedDeltaArgs, "causal_conv": CausalConvArgs, "norm": NormArgs}


def _function(name, result, *arguments):
    function = getattr(_LIBRARY, name)
    function.restype, function.argtypes = result, arguments
    return function


_status_string = _function("q3n_status_string", ctypes.c_char_p, _I32)
_isa_available = _function("q3n_isa_available", _I32, _I32)
if _function("q3n_abi_version", _I32)() != ABI_VERSION:
    raise ImportError(f"{_FOLDER}: the library is not of ABI version {ABI_VERSION}")
_RANGES.restype = _I32
_RANGES.argtypes = [_POINTER, _POINTER, ctypes.POINTER(Variant), _POINTER, _I64, _I64, _POINTER, _I64]


class _Operator:
    def __init__(self, name):
        self.check = _function(f"q3n_{name}_check", _I32, _POINTER)
        self.best = _function(f"q3n_{name}_best", ctypes.POINTER(Variant), _POINTER)
        self.run = ctypes.cast(getattr(_LIBRARY, f"q3n_{name}_run"), _POINTER)
        count = _function(f"q3n_{name}_variant_count", _I64)
        at = _function(f"q3n_{name}_variant_at", ctypes.POINTER(Variant), _I64)
        self.variants = {v.contents.name.decode(): v for v in map(at, range(count()))}


_OPERATORS = {name: _Operator(name) for name in ARGS}


def _torch_threads():
    """GOMP_parallel of the runtime that libtorch_cpu is linked with; None where torch was built on other threads."""
    folder = pathlib.Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            # A symbol asked of a library is searched in what it depends on, in order.
            return getattr(ctypes.CDLL(str(folder / name)), "GOMP_parallel", None)
    return None


_PARALLEL = _torch_threads() if "OpenMP" in torch.__config__.parallel_info() else None
# Operations below which a part is not worth a fork and a join.
_FORK_COST = 40_000


def variants(op):
    """Names of the variants of an operator that this CPU can run."""
    return [name for name, v in _OPERATORS[op].variants.items() if _isa_available(v.contents.isa)]


def status_string(status):
    """The library's sentence for a status."""
    return _status_string(status).decode()


def run(op, args, *, cost, variant="", threads=None, scratch=None):
    """Checks args and runs every work item on torch's threads. RuntimeError with the library's text where it refuses.

    cost: rough number of operations, which decides how many threads are worth a fork. scratch: a uint8 tensor to use
    instead of fresh memory.
    """
    operator = _OPERATORS[op]
    address = ctypes.addressof(args)

    def must(status):
        if status:
            raise RuntimeError(f"q3n {op}: {status_string(status)}")

    must(operator.check(address))
    if variant:
        if variant not in operator.variants:
            raise RuntimeError(f"q3n {op}: no variant {variant!r}; there are {', '.join(operator.variants)}")
        chosen = operator.variants[variant]
    else:
        chosen = operator.best(address)
    items = chosen.contents.items(address)
    parts = max(1, min(threads or torch.get_num_threads(), items, cost // _FORK_COST if threads is None else items))
    need = (chosen.contents.scratch_bytes(address) + 63) // 64 * 64
    if scratch is None:
        # torch's CPU allocator aligns to 64 bytes, which is what scratch needs.
        scratch = torch.empty(parts * need, dtype=torch.uint8)
    must(_RANGES(_PARALLEL, operator.run, chosen, address, items, parts, scratch.data_ptr() or None, scratch.numel() // parts))
