//! Element and block types of tensors.

use crate::ffi;
use std::fmt;

/// A tensor's element type; block types hold several elements in one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DType(pub(crate) ffi::q3n_dtype);

impl DType {
    /// 32-bit float.
    pub const F32: DType = DType(ffi::Q3N_F32);
    /// IEEE half.
    pub const F16: DType = DType(ffi::Q3N_F16);
    /// bfloat16.
    pub const BF16: DType = DType(ffi::Q3N_BF16);
    /// 32 int8 with one f16 scale.
    pub const Q8_0: DType = DType(ffi::Q3N_Q8_0);
    /// 32 4-bit values with one f16 scale.
    pub const Q4_0: DType = DType(ffi::Q3N_Q4_0);
    /// 32 4-bit values with one f16 scale and one f16 minimum.
    pub const Q4_1: DType = DType(ffi::Q3N_Q4_1);
    /// 32 5-bit values with one f16 scale.
    pub const Q5_0: DType = DType(ffi::Q3N_Q5_0);
    /// 32 5-bit values with one f16 scale and one f16 minimum.
    pub const Q5_1: DType = DType(ffi::Q3N_Q5_1);
    /// 256 2-bit values with 4-bit scales and minima.
    pub const Q2_K: DType = DType(ffi::Q3N_Q2_K);
    /// 256 3-bit values with 6-bit scales.
    pub const Q3_K: DType = DType(ffi::Q3N_Q3_K);
    /// 256 4-bit values with 6-bit scales and minima.
    pub const Q4_K: DType = DType(ffi::Q3N_Q4_K);
    /// 256 5-bit values with 6-bit scales and minima.
    pub const Q5_K: DType = DType(ffi::Q3N_Q5_K);
    /// 256 6-bit values with 8-bit scales.
    pub const Q6_K: DType = DType(ffi::Q3N_Q6_K);
    /// 32 values of 16 uneven levels with one f16 scale.
    pub const IQ4_NL: DType = DType(ffi::Q3N_IQ4_NL);
    /// 256 values of the same levels with 6-bit scales.
    pub const IQ4_XS: DType = DType(ffi::Q3N_IQ4_XS);
    /// 32 4-bit floats (e2m1) with one scale that is a power of two.
    pub const MXFP4: DType = DType(ffi::Q3N_MXFP4);

    /// Activations quantised at run time, 32 with one f32 scale. Never in files.
    pub const Q8_X32: DType = DType(ffi::Q3N_Q8_X32);
    /// Activations quantised at run time, 256 with one f32 scale. Never in files.
    pub const Q8_X256: DType = DType(ffi::Q3N_Q8_X256);

    /// Every supported type of files.
    pub const ALL: [DType; 16] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
        DType::IQ4_NL,
        DType::IQ4_XS,
        DType::MXFP4,
    ];

    /// The supported type with this ggml type number, as stored in GGUF files.
    pub fn from_ggml(number: u32) -> Option<DType> {
        Self::ALL.into_iter().find(|t| t.0 == number)
    }

    /// The supported type of this name, in any case: `q4_k`, `BF16`.
    pub fn from_name(name: &str) -> Option<DType> {
        Self::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(name))
    }

    /// ggml's number of the type.
    pub fn ggml(self) -> u32 {
        self.0
    }

    /// What activations that meet weights of this type are quantised to; F32 for plain types.
    pub fn activations(self) -> DType {
        // SAFETY: takes a value, reads a table.
        DType(unsafe { ffi::q3n_dtype_activations(self.0) })
    }

    /// The type with every 16 rows interleaved (`csrc/quant/repack.h`); `None` for plain types.
    pub fn interleaved(self) -> Option<DType> {
        let dtype = DType(self.0 | ffi::Q3N_R16);
        (dtype.block() > 0).then_some(dtype)
    }

    /// Rows lie interleaved in groups of 16.
    pub fn is_interleaved(self) -> bool {
        self.0 & ffi::Q3N_R16 != 0
    }

    /// The type with rows one after the other.
    pub fn rows(self) -> DType {
        DType(self.0 & !ffi::Q3N_R16)
    }

    /// `f32`, `q4_k`, `q4_k_r16`, ...
    pub fn name(self) -> &'static str {
        // SAFETY: q3n_dtype_name returns a static ASCII string for every value.
        unsafe { std::ffi::CStr::from_ptr(ffi::q3n_dtype_name(self.0)) }.to_str().unwrap_or("")
    }

    /// Elements in a block; 1 for plain types.
    pub fn block(self) -> usize {
        // SAFETY: takes a value, reads a table.
        unsafe { ffi::q3n_dtype_block(self.0) as usize }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        // SAFETY: takes a value, reads a table.
        unsafe { ffi::q3n_dtype_block_bytes(self.0) as usize }
    }

    /// Bytes of `n` elements; `None` where `n` is no multiple of the block, or too large.
    pub fn bytes(self, n: usize) -> Option<usize> {
        // SAFETY: takes values, reads a table.
        let bytes = unsafe { ffi::q3n_dtype_bytes(self.0, i64::try_from(n).ok()?) };
        usize::try_from(bytes).ok()
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}
