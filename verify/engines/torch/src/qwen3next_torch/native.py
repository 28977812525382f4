"""The C library: its args structs, calls cut over torch's own threads, and CUDA kernels queued on torch's current stream.
Field by field as in csrc/*/<op>.h."""

import contextlib
import ctypes
import functools
import pathlib
import sys

import torch

_FOLDER = pathlib.Path(__file__).parent
_SUFFIX = {"darwin": ".dylib"}.get(sys.platform, ".so")
_LIBRARY = ctypes.CDLL(str(_FOLDER / f"libq3n{_SUFFIX}"))
_RANGES = ctypes.CDLL(str(_FOLDER / "libq3n_ranges.so")).q3n_ranges

ABI_VERSION = 3
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
        dtype gate head_map qk_l2norm: i32
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


@functools.cache
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


# CUDA kernels by the name of a variant; the first is the one that picks among them by the sizes.
_KERNELS = {
    "gated_delta": {"cuda": "gated_delta", "recurrent_cuda": "gated_delta_recurrent", "chunked64_cuda": "gated_delta_chunked"},
    "causal_conv": {"cuda": "causal_conv"},
    "norm": {"cuda": "norm"},
}
HAS_CUDA = hasattr(_LIBRARY, "q3n_norm_cuda")
HAS_EXECUTOR = hasattr(_LIBRARY, "q3n_norm_cuda_host")
# The low byte of a status whose text is a report of the CUDA runtime or of the host executor.
_DEVICE_FAILED = 12


class _Gpu:
    """Kernels on the current stream of the current device."""

    suffix, report = "_cuda", "q3n_cuda_report"

    @staticmethod
    def queue(name, address, scratch):
        launch = _function(f"q3n_{name}_cuda", _I32, _POINTER, _POINTER, _POINTER)
        return launch(address, scratch, torch.cuda.current_stream().cuda_stream)


class _Executor:
    """The same kernels on the CPU."""

    suffix, report = "_cuda_host", "q3n_cuda_host_report"

    @staticmethod
    def queue(name, address, scratch):
        items = _function(f"q3n_{name}_cuda_host_items", _I64, _POINTER)
        return _function(f"q3n_{name}_cuda_host", _I32, _POINTER, _I64, _I64, _POINTER)(address, 0, items(address), scratch)


_executing = False


@contextlib.contextmanager
def executor():
    """For proofs without a GPU: tensors on the CPU take the way of CUDA tensors, but for the stream, and the host executor
    runs the kernels. In packages built with Q3N_CUDA_HOST=1."""
    global _executing
    if not HAS_EXECUTOR:
        raise RuntimeError("q3n: this package is built without the host executor: Q3N_CUDA_HOST=1 pip install")
    _executing = True
    try:
        yield
    finally:
        _executing = False


def executing():
    """Within executor()."""
    return _executing


def guard(device):
    """Makes a GPU the current device for a while."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def capturing(device):
    """Whether a graph is captured of what is queued on that device now."""
    with guard(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def variants(op, device="cpu"):
    """Names of the variants of an operator that this CPU can run, or of its CUDA kernels."""
    if device == "cuda":
        return list(_KERNELS[op]) if HAS_CUDA else []
    return [name for name, v in _OPERATORS[op].variants.items() if _isa_available(v.contents.isa)]


def status_string(status):
    """The library's sentence for a status."""
    return _status_string(status).decode()


def _must(op, status, report=None):
    if status:
        failed = report and status & 0xFF == _DEVICE_FAILED
        raise RuntimeError(f"q3n {op}: {_function(report, ctypes.c_char_p)().decode() if failed else status_string(status)}")


def _choose(op, variant, among):
    if variant not in among:
        raise RuntimeError(f"q3n {op}: no variant {variant!r}; there are {', '.join(among)}")
    return among[variant]


def run(op, args, device, *, cost, indices=None, variant="", threads=None, scratch=None):
    """Checks args and computes. RuntimeError with the library's text where it refuses. indices: index arrays by name, each
    as a tensor on the CPU, which the check reads, and one on the device, whose address then takes its place.

    CPU: every work item on torch's threads. cost: rough number of operations, which decides how many threads are worth a
    fork. scratch: a uint8 tensor to use instead of fresh memory.
    CUDA: queued on the current stream of the device, with scratch from torch's allocator; nothing is waited for."""
    indices = indices or {}
    for name, (host, _) in indices.items():
        setattr(args, name, host.data_ptr())
    _must(op, _OPERATORS[op].check(ctypes.addressof(args)))
    for name, (_, there) in indices.items():
        setattr(args, name, there.data_ptr())
    if device.type == "cpu" and not _executing:
        _run_on_threads(op, args, cost, variant, threads, scratch)
    else:
        _queue(op, args, device, variant)


def _queue(op, args, device, variant):
    machine, address = _Executor if device.type == "cpu" else _Gpu, ctypes.addressof(args)
    name = _choose(op, variant or "cuda", _KERNELS[op])
    with guard(device):
        need = _function(f"q3n_{name}{machine.suffix}_scratch_bytes", _I64, _POINTER)(address)
        # Of the current stream: freed on return, it goes to nobody else before the kernels are done.
        scratch = torch.empty(need, dtype=torch.uint8, device=device)
        _must(op, machine.queue(name, address, scratch.data_ptr() or None), machine.report)


def _run_on_threads(op, args, cost, variant, threads, scratch):
    operator, address = _OPERATORS[op], ctypes.addressof(args)
    chosen = _choose(op, variant, operator.variants) if variant else operator.best(address)
    items = chosen.contents.items(address)
    parts = max(1, min(threads or torch.get_num_threads(), items, cost // _FORK_COST if threads is None else items))
    need = (chosen.contents.scratch_bytes(address) + 63) // 64 * 64
    if scratch is None:
        # torch's CPU allocator aligns to 64 bytes, which is what scratch needs.
        scratch = torch.empty(parts * need, dtype=torch.uint8)
    _must(op, _RANGES(_PARALLEL, operator.run, chosen, address, items, parts, scratch.data_ptr() or None, scratch.numel() // parts))
