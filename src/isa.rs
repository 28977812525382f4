//! Instruction sets: what the CPU offers, and a mask that walks dispatch down.

use crate::ffi;
use std::fmt;

/// An instruction set that variants are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(pub(crate) ffi::q3n_isa);

impl Isa {
    /// Plain C, always available.
    pub const SCALAR: Isa = Isa(ffi::Q3N_ISA_SCALAR);

    /// CUDA kernels on the CPU, in libraries built with `cuda-host`.
    pub const CUDA_HOST: Isa = Isa(ffi::Q3N_ISA_CUDA_HOST);

    /// Every instruction set the library knows, available or not.
    pub fn all() -> impl Iterator<Item = Isa> {
        (0..ffi::Q3N_ISA_COUNT).map(Isa)
    }

    /// `scalar`, `avx2`, `avx512`, ...
    pub fn name(self) -> &'static str {
        // SAFETY: q3n_isa_name returns a static ASCII string for every value.
        unsafe { std::ffi::CStr::from_ptr(ffi::q3n_isa_name(self.0)) }.to_str().unwrap_or("")
    }

    /// The instruction set of that name.
    pub fn from_name(name: &str) -> Option<Isa> {
        Isa::all().find(|isa| isa.name() == name)
    }

    /// Present on this CPU and allowed by the mask.
    pub fn available(self) -> bool {
        // SAFETY: takes a value, reads CPU flags.
        unsafe { ffi::q3n_isa_available(self.0) != 0 }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Allow only these instruction sets from now on, in every thread (`SCALAR` is always allowed).
pub fn allow(isas: &[Isa]) {
    let mask = isas.iter().fold(1, |mask, isa| mask | 1u32 << isa.0);
    // SAFETY: stores one atomic.
    unsafe { ffi::q3n_isa_set_mask(mask) }
}

/// Allow every instruction set that the CPU has: the default.
pub fn allow_all() {
    // SAFETY: stores one atomic.
    unsafe { ffi::q3n_isa_set_mask(u32::MAX) }
}
