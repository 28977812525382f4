//! Qwen3-Next's operators as raw C kernels with safe wrappers.
//!
//! One module an operator, under the same name as its folder in `csrc/`, where the header states formula, shapes and
//! failure. A wrapper takes [`View`]s, checks every shape, stride, alias and scratch size, splits the work over rayon's
//! threads and calls the C variant that dispatch or the caller chose ([`Exec`]).
//!
//! ```
//! use qwen3next_kernels::{solve_tri, Exec, View, ViewMut};
//! let (l, b, mut x) = ([2.0f32, 0.0, 1.0, 4.0], [2.0f32, 9.0], [0.0f32; 2]);
//! solve_tri::run(
//!     solve_tri::Args {
//!         x: ViewMut::new(&mut x, [1, 2, 1])?,
//!         l: View::new(&l, [1, 2, 2])?,
//!         b: Some(View::new(&b, [1, 2, 1])?),
//!         unit_diagonal: false,
//!     },
//!     &Exec::default(),
//! )?;
//! assert_eq!(x, [1.0, 2.0]);
//! # Ok::<(), qwen3next_kernels::Error>(())
//! ```
//!
//! | module | operator |
//! | --- | --- |
//! | [`attention`] | flash attention with grouped heads, and the merge of its parts |
//! | [`causal_conv`] | depthwise causal convolution with state |
//! | [`gated_delta`] | the gated delta rule |
//! | [`layer`] | the small steps between them: rows of a table, sums, gates, rows into a cache |
//! | [`matmul`] | Y = X Wᵀ with quantised W |
//! | [`moe`] | router, grouping and expert feed-forward |
//! | [`activations`] | f32 activations to 8 bits |
//! | [`norm`] | RMS norms, gated RMS norm, L2 norm |
//! | [`quant`] | block formats to and from f32 |
//! | [`repack`] | weights into interleaved rows |
//! | [`rope`] | partial rotary embedding |
//! | [`solve_tri`] | batched triangular solve and inverse |
//!
//! With the features `cuda` (GPUs) and `cuda-host` (the same kernels on the CPU, watched), `device` holds devices, streams
//! and buffers, and an operator's arguments take views of buffers as well as of slices ([`memory`]): `queue` beside `run`.
//!
//! [`isa`] tells what the CPU offers and narrows it; [`dtype`] lists element types; [`operator`] holds what all
//! operators share.

#[allow(missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals, dead_code)]
#[allow(clippy::all)]
#[rustfmt::skip]
pub mod ffi;

pub mod activations;
pub mod attention;
pub mod causal_conv;
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub mod device;
pub mod dtype;
pub mod gated_delta;
pub mod isa;
pub mod layer;
pub mod matmul;
pub mod memory;
pub mod moe;
pub mod norm;
pub mod operator;
pub mod quant;
pub mod repack;
pub mod rope;
pub mod solve_tri;
mod status;
mod view;
mod weight;

pub use dtype::DType;
pub use isa::Isa;
pub use memory::{Cpu, Memory};
pub use operator::{Exec, Operator, Variant};
pub use status::Error;
pub use view::{View, ViewMut};
pub use weight::Weight;

#[cfg(all(test, feature = "bindgen"))]
mod tests {
    #[test]
    fn committed_bindings_equal_fresh_ones() {
        let fresh = include_str!(concat!(env!("OUT_DIR"), "/ffi.rs"));
        assert!(
            include_str!("ffi.rs") == fresh,
            "src/ffi.rs is stale: run Q3N_WRITE_BINDINGS=1 cargo build --features bindgen"
        );
    }
}
