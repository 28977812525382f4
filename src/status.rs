//! What can go wrong in a call, as a value.

use crate::ffi;
use std::ffi::CStr;

/// Why a call was refused. Every variant names the argument.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The C library refused the arguments; the text names the argument and the reason.
    #[error("{operator}: {text}")]
    Status {
        /// Operator that refused.
        operator: &'static str,
        /// The raw `q3n_status`.
        code: i32,
        /// `q3n_status_string` of it.
        text: &'static str,
    },
    /// A view's shape is not what the other arguments call for.
    #[error("{arg}: shape {got:?}, expected {expected:?}")]
    Shape {
        /// Argument name as in the operator's header.
        arg: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What the other arguments call for.
        expected: Vec<usize>,
    },
    /// A slice is too short for the shape and strides of its view.
    #[error("view of shape {shape:?} and strides {strides:?} needs {needed} elements, the slice has {len}")]
    Length {
        /// Shape of the view.
        shape: Vec<usize>,
        /// Its strides in elements.
        strides: Vec<usize>,
        /// Elements it reaches over.
        needed: usize,
        /// Elements there are.
        len: usize,
    },
    /// A token's data holds a NaN where values must be ordered.
    #[error("{operator}: {arg} of token {token} hold a NaN")]
    Nan {
        /// Operator that refused.
        operator: &'static str,
        /// Argument name as in the operator's header.
        arg: &'static str,
        /// The lowest such token.
        token: usize,
    },
    /// A CUDA kernel failed, on the device or in the host executor.
    #[error("{operator}: {report}")]
    Device {
        /// Operator that failed.
        operator: &'static str,
        /// What the runtime or the executor says of it.
        report: String,
    },
    /// Any other misuse: the text names argument and expectation.
    #[error("{arg}: {why}")]
    Argument {
        /// Argument name as in the operator's header.
        arg: &'static str,
        /// What was expected.
        why: String,
    },
}

impl Error {
    /// The kind of status (`ffi::Q3N_NAN`, ...) where the C library refused.
    pub fn kind(&self) -> Option<u32> {
        match self {
            Error::Status { code, .. } => Some(*code as u32 & 0xff),
            Error::Nan { .. } => Some(ffi::Q3N_NAN),
            Error::Device { .. } => Some(ffi::Q3N_DEVICE),
            _ => None,
        }
    }

    pub(crate) fn argument(arg: &'static str, why: impl Into<String>) -> Self {
        Error::Argument { arg, why: why.into() }
    }
}

/// `Ok` where `status` is `Q3N_OK`.
pub(crate) fn check(operator: &'static str, status: i32) -> Result<(), Error> {
    if status == ffi::Q3N_OK as i32 {
        return Ok(());
    }
    #[cfg(feature = "cuda-host")]
    if status as u32 & 0xff == ffi::Q3N_DEVICE {
        // SAFETY: a NUL-terminated text that only this thread's next launch changes.
        let report = unsafe { CStr::from_ptr(ffi::q3n_cuda_host_report()) };
        return Err(Error::Device { operator, report: report.to_string_lossy().into_owned() });
    }
    // SAFETY: q3n_status_string returns a static NUL-terminated string for every value.
    let text = unsafe { CStr::from_ptr(ffi::q3n_status_string(status)) };
    Err(Error::Status { operator, code: status, text: text.to_str().unwrap_or("status text is not UTF-8") })
}
