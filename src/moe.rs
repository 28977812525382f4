//! Router, grouping and expert feed-forward (`csrc/moe/moe.h`).
//!
//! [`Routing::route`] turns router logits into a [`Routing`] (who goes where, with which weight, grouped by expert);
//! [`run`] feeds tokens through it. The shared expert and a dense feed-forward are the same calls with
//! [`Routing::dense`].
//!
//! ```
//! use qwen3next_kernels::{moe, DType, View, ViewMut, Weight};
//! let logits = [0.0f32, 2.0, 1.0]; // one token, three experts
//! let routing = moe::Routing::route(View::new(&logits, [1, 3])?, 2, true, &Default::default())?;
//! assert_eq!(routing.ids(), [1, 2]);
//! let zeros = vec![0u8; 3 * 4 * 8 * 4]; // [E][F][D] or [E][D][F] of f32, all zero
//! let (x, mut y, mut h) = ([1.0f32; 8], [f32::NAN; 8], Default::default());
//! moe::run(
//!     moe::Args {
//!         y: ViewMut::new(&mut y, [1, 8])?,
//!         x: View::new(&x, [1, 8])?.into(),
//!         gate: Weight::new(&zeros, DType::F32, [3, 4, 8])?,
//!         up: Weight::new(&zeros, DType::F32, [3, 4, 8])?,
//!         down: Weight::new(&zeros, DType::F32, [3, 8, 4])?,
//!         routing: &routing,
//!         accumulate: false,
//!         h: &mut h,
//!     },
//!     &Default::default(),
//! )?;
//! assert_eq!(y, [0.0; 8]);
//! # Ok::<(), qwen3next_kernels::Error>(())
//! ```

use crate::activations::{self, Rows, Q8};
use crate::{DType, Error, Exec, View, ViewMut, Weight};

/// Which tokens go to which experts, with which weights. Made only by the router or from checked ids, so the
/// grouping in it is always valid.
#[derive(Debug, Clone)]
pub struct Routing {
    tokens: usize,
    experts: usize,
    top_k: usize,
    ids: Vec<i32>,
    weights: Option<Vec<f32>>,
    order: Vec<i64>,
    offsets: Vec<i64>,
}

impl Default for Routing {
    /// No tokens, no experts.
    fn default() -> Self {
        Routing { tokens: 0, experts: 0, top_k: 0, ids: Vec::new(), weights: None, order: Vec::new(), offsets: vec![0] }
    }
}

impl Routing {
    /// Routes `logits` `[T][E]`: softmax over all experts, the `top_k` largest, ties to the lower index; `normalize`
    /// divides the weights by their sum. Errors: [`Error::Nan`] with the lowest token that has a NaN logit;
    /// `top_k` outside 1..=E.
    pub fn route(logits: View<2>, top_k: usize, normalize: bool, exec: &Exec<route::Op>) -> Result<Self, Error> {
        let mut routing = Self::default();
        routing.route_again(logits, top_k, normalize, exec)?;
        Ok(routing)
    }

    /// As [`route`](Self::route), in the memory of a routing that is no longer needed. After an error it has no tokens.
    pub fn route_again(
        &mut self,
        logits: View<2>,
        top_k: usize,
        normalize: bool,
        exec: &Exec<route::Op>,
    ) -> Result<(), Error> {
        let [tokens, experts] = logits.shape();
        if top_k == 0 || top_k > experts {
            self.clear();
            return Err(Error::argument("top_k", format!("{top_k} of {experts} experts")));
        }
        self.refill(experts, top_k, |ids, weights| {
            let pairs = pairs(tokens, top_k)?;
            ids.resize(pairs, 0);
            weights.get_or_insert_default().resize(pairs, 0.0);
            let weights = weights.as_mut().map_or(&mut [][..], |w| w.as_mut_slice());
            route::run(route::Args { ids, weights, logits, top_k, normalize }, exec)
        })
    }

    /// Routing by the caller's choice: `ids` `[T][top_k]` below `experts`, `weights` of the same length (`None`: all
    /// 1). The same expert may come twice in a token. Errors: an id out of range, lengths that do not fit.
    pub fn from_ids(experts: usize, top_k: usize, ids: Vec<i32>, weights: Option<Vec<f32>>) -> Result<Self, Error> {
        if top_k == 0 || ids.len() % top_k != 0 {
            return Err(Error::argument("top_k", format!("{} ids are no multiple of {top_k}", ids.len())));
        }
        if let Some(n) = weights.as_ref().map(Vec::len).filter(|&n| n != ids.len()) {
            return Err(Error::argument("weights", format!("{n} weights for {} ids", ids.len())));
        }
        let mut routing = Self::default();
        routing.refill(experts, top_k, |own_ids, own_weights| {
            (*own_ids, *own_weights) = (ids, weights);
            Ok(())
        })?;
        Ok(routing)
    }

    /// Every token to the only expert, with a weight a token (`None`: 1): the shared expert, a dense feed-forward.
    pub fn dense(tokens: usize, weights: Option<Vec<f32>>) -> Result<Self, Error> {
        Self::from_ids(1, 1, vec![0; tokens], weights)
    }

    /// As [`dense`](Self::dense) with these weights, in the memory of a routing that is no longer needed. After an
    /// error it has no tokens.
    pub fn dense_again(&mut self, weights: impl ExactSizeIterator<Item = f32>) -> Result<(), Error> {
        self.refill(1, 1, |ids, own| {
            ids.resize(weights.len(), 0);
            own.get_or_insert_default().extend(weights);
            Ok(())
        })
    }

    /// No tokens, no experts.
    fn clear(&mut self) {
        (self.tokens, self.experts, self.top_k) = (0, 0, 0);
        self.ids.clear();
        self.weights.iter_mut().for_each(Vec::clear);
        self.order.clear();
        self.offsets.clear();
        self.offsets.push(0);
    }

    /// Empties ids and weights, has `fill` fill them, and groups them. After an error there are no tokens.
    fn refill(
        &mut self,
        experts: usize,
        top_k: usize,
        fill: impl FnOnce(&mut Vec<i32>, &mut Option<Vec<f32>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.clear();
        let filled = if experts > MAX_EXPERTS {
            Err(Error::argument("E", format!("{experts} experts, at most {MAX_EXPERTS}")))
        } else {
            fill(&mut self.ids, &mut self.weights)
        };
        let grouped = filled.and_then(|()| {
            self.order.resize(self.ids.len(), 0);
            self.offsets.resize(experts + 1, 0);
            let args = group::Args { order: &mut self.order, offsets: &mut self.offsets, ids: &self.ids, top_k };
            group::run(args, &Exec::default())
        });
        if grouped.is_err() {
            self.clear();
        } else {
            (self.tokens, self.experts, self.top_k) = (self.ids.len() / top_k, experts, top_k);
        }
        grouped
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Choices a token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Chosen experts, `[T][top_k]`.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// Their weights, `[T][top_k]`; `None`: all 1.
    pub fn weights(&self) -> Option<&[f32]> {
        self.weights.as_deref()
    }

    /// The pairs `t * top_k + choice`, grouped by expert.
    pub fn order(&self) -> &[i64] {
        &self.order
    }

    /// Where each expert's pairs start in [`order`](Self::order), `[E + 1]`.
    pub fn offsets(&self) -> &[i64] {
        &self.offsets
    }
}

/// As the C side has it.
const MAX_EXPERTS: usize = 65536;

/// T * top_k, refused where it is absurd rather than overflowing.
fn pairs(tokens: usize, top_k: usize) -> Result<usize, Error> {
    tokens
        .checked_mul(top_k)
        .filter(|&n| n <= 1 << 40)
        .ok_or_else(|| Error::argument("top_k", format!("{tokens} tokens times {top_k} choices is too many")))
}

/// Arguments of [`run`].
pub struct Args<'a> {
    /// Output, `[T][D]`.
    pub y: ViewMut<'a, 2>,
    /// Activations, `[T][D]`, f32 or quantised for gate and up. The hidden activations follow them: f32, or quantised
    /// for down.
    pub x: Rows<'a>,
    /// Gate projections, `[E][F][D]`; a merged tensor is cut by [`Weight::split_gate_up`].
    pub gate: Weight<'a, 3>,
    /// Up projections, `[E][F][D]`.
    pub up: Weight<'a, 3>,
    /// Down projections, `[E][D][F]`.
    pub down: Weight<'a, 3>,
    /// Who goes where.
    pub routing: &'a Routing,
    /// Add to y instead of overwriting it.
    pub accumulate: bool,
    /// Working memory, which a warm call does not allocate anew. Contents are free.
    pub h: &'a mut Hidden,
}

/// Hidden activations of all pairs, `[T * top_k][F]`: f32 from up, quantised for down where x was.
#[derive(Debug, Clone, Default)]
pub struct Hidden {
    floats: Vec<f32>,
    quantized: Q8,
}

/// How [`run`] runs its steps.
#[derive(Default, Clone)]
pub struct Execs {
    /// Gate and up.
    pub up: Exec<up::Op>,
    /// Quantising the hidden activations.
    pub activations: Exec<activations::Op>,
    /// Down and combine.
    pub down: Exec<down::Op>,
}

/// y_t = Σ_c weight · Wdown (silu(Wgate x_t) · Wup x_t) over the experts that the routing chose for t: [`up::run`],
/// then [`down::run`]. A token's result does not depend on the others in the batch, bit for bit. Errors: shapes that
/// do not fit together, overlapping output strides.
pub fn run(args: Args, execs: &Execs) -> Result<(), Error> {
    let Args { y, x, gate, up, down, routing, accumulate, h } = args;
    let [_, f, _] = gate.shape();
    let pairs = routing.ids.len();
    let len = pairs.checked_mul(f).ok_or_else(|| Error::argument("gate", format!("F = {f} is too large")))?;
    // Shapes are checked before memory is taken for them.
    down.expect("down", [routing.experts, y.shape()[1], f])?;
    gate.expect("gate", [routing.experts, f, x.shape()[1]])?;
    if h.floats.len() < len {
        h.floats.resize(len, 0.0);
    }
    up::run(up::Args { h: &mut h.floats[..len], x, gate, up, routing }, &execs.up)?;
    let hidden = View::new(&h.floats[..len], [pairs, f])?;
    let suits = down.dtype().activations();
    let hidden = if x.dtype() == DType::F32 || suits == DType::F32 {
        hidden.into()
    } else {
        h.quantized.quantize(suits, hidden, &execs.activations)?;
        (&h.quantized).into()
    };
    down::run(down::Args { y, h: hidden, down, routing, accumulate }, &execs.down)
}

/// Router logits to experts and weights.
pub mod route {
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, View};

    operator!(
        "moe_route",
        q3n_moe_route_args,
        q3n_moe_route_check,
        q3n_moe_route_variant_count,
        q3n_moe_route_variant_at,
        q3n_moe_route_best
    );

    /// Arguments of [`run`].
    pub struct Args<'a> {
        /// Output, `[T][top_k]`: chosen experts, largest first.
        pub ids: &'a mut [i32],
        /// Output, `[T][top_k]`: their weights.
        pub weights: &'a mut [f32],
        /// Router logits, `[T][E]`.
        pub logits: View<'a, 2>,
        /// Choices a token, 1..=E.
        pub top_k: usize,
        /// Divide the weights by their sum.
        pub normalize: bool,
    }

    /// Routes every token. Errors: [`Error::Nan`] with the lowest token that has a NaN logit, however the tokens were
    /// cut into parts (outputs are partly written then); lengths that do not fit; `top_k` outside 1..=E.
    pub fn run(args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let [tokens, experts] = args.logits.shape();
        let pairs = super::pairs(tokens, args.top_k)?;
        for (arg, len) in [("ids", args.ids.len()), ("weights", args.weights.len())] {
            if len != pairs {
                return Err(Error::Shape { arg, got: vec![len], expected: vec![tokens, args.top_k] });
            }
        }
        let mut bad_token = i64::MAX;
        let raw = ffi::q3n_moe_route_args {
            struct_bytes: size_of::<ffi::q3n_moe_route_args>() as u64,
            ids: args.ids.as_mut_ptr(),
            weights: args.weights.as_mut_ptr(),
            bad_token: &mut bad_token,
            logits: args.logits.as_ptr(),
            normalize: args.normalize.into(),
            logits_t: args.logits.stride(0),
            T: tokens as i64,
            E: experts as i64,
            top_k: args.top_k as i64,
        };
        // SAFETY: the outputs hold T * top_k values, the logits' view lies inside its slice; bad_token outlives the
        // call and is written atomically.
        let result = unsafe { exec.execute(&raw, tokens.saturating_mul(experts).saturating_mul(16)) };
        match usize::try_from(bad_token) {
            Ok(token) if token < tokens => Err(Error::Nan { operator: "moe_route", arg: "logits", token }),
            _ => result,
        }
    }
}

/// Pairs of token and choice, sorted by expert.
pub mod group {
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error};

    operator!(
        "moe_group",
        q3n_moe_group_args,
        q3n_moe_group_check,
        q3n_moe_group_variant_count,
        q3n_moe_group_variant_at,
        q3n_moe_group_best
    );

    /// Arguments of [`run`].
    pub struct Args<'a> {
        /// Output, `[T * top_k]`: the pairs `t * top_k + choice` by expert.
        pub order: &'a mut [i64],
        /// Output, `[E + 1]`: where each expert's pairs start.
        pub offsets: &'a mut [i64],
        /// Chosen experts, `[T][top_k]`.
        pub ids: &'a [i32],
        /// Choices a token, at least 1.
        pub top_k: usize,
    }

    /// Groups the pairs, stably. Errors: an id outside 0..E, lengths that do not fit.
    pub fn run(args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let (pairs, top_k) = (args.ids.len(), args.top_k);
        if top_k == 0 || pairs % top_k != 0 {
            return Err(Error::argument("top_k", format!("{pairs} ids are no multiple of {top_k}")));
        }
        if args.order.len() != pairs {
            return Err(Error::Shape { arg: "order", got: vec![args.order.len()], expected: vec![pairs] });
        }
        if args.offsets.is_empty() {
            return Err(Error::argument("offsets", "is empty, expected E + 1 values"));
        }
        let raw = ffi::q3n_moe_group_args {
            struct_bytes: size_of::<ffi::q3n_moe_group_args>() as u64,
            order: args.order.as_mut_ptr(),
            offsets: args.offsets.as_mut_ptr(),
            ids: args.ids.as_ptr(),
            T: (pairs / top_k) as i64,
            E: (args.offsets.len() - 1) as i64,
            top_k: top_k as i64,
        };
        // SAFETY: the lengths were just compared with the sizes; ids are checked by the kernel before it writes.
        unsafe { exec.execute(&raw, 0) }
    }
}

/// Gate and up projections with SwiGLU.
pub mod up {
    use super::Routing;
    use crate::activations::Rows;
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, Weight};

    operator!(
        "moe_up",
        q3n_moe_up_args,
        q3n_moe_up_check,
        q3n_moe_up_variant_count,
        q3n_moe_up_variant_at,
        q3n_moe_up_best
    );

    /// Arguments of [`run`].
    pub struct Args<'a> {
        /// Output, `[T * top_k][F]`.
        pub h: &'a mut [f32],
        /// Activations, `[T][D]`, f32 or quantised for gate and up.
        pub x: Rows<'a>,
        /// Gate projections, `[E][F][D]`.
        pub gate: Weight<'a, 3>,
        /// Up projections, `[E][F][D]`.
        pub up: Weight<'a, 3>,
        /// Who goes where.
        pub routing: &'a Routing,
    }

    /// h = silu(Wgate x) · Wup x for every pair of token and expert. Errors: shapes that do not fit together.
    pub fn run(args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let Routing { tokens, experts, top_k, .. } = *args.routing;
        let (pairs, [_, f, d]) = (tokens * top_k, args.gate.shape());
        args.x.expect("x", [tokens, d])?;
        args.gate.expect("gate", [experts, f, d])?;
        args.up.expect("up", [experts, f, d])?;
        if Some(args.h.len()) != pairs.checked_mul(f) {
            return Err(Error::Shape { arg: "h", got: vec![args.h.len()], expected: vec![pairs, f] });
        }
        let raw = ffi::q3n_moe_up_args {
            struct_bytes: size_of::<ffi::q3n_moe_up_args>() as u64,
            h: args.h.as_mut_ptr(),
            x: args.x.as_ptr(),
            gate: args.gate.as_ptr(),
            up: args.up.as_ptr(),
            order: args.routing.order.as_ptr(),
            offsets: args.routing.offsets.as_ptr(),
            gate_dtype: args.gate.dtype().0,
            up_dtype: args.up.dtype().0,
            x_dtype: args.x.dtype().0,
            x_t: args.x.stride(),
            gate_e: args.gate.stride(0),
            gate_f: args.gate.stride(1),
            up_e: args.up.stride(0),
            up_f: args.up.stride(1),
            T: tokens as i64,
            E: experts as i64,
            top_k: top_k as i64,
            D: d as i64,
            F: f as i64,
        };
        let cost = (2 * pairs + 4 * pairs.min(experts)).saturating_mul(f).saturating_mul(d.saturating_mul(2));
        // SAFETY: every view lies inside its slice and has the shape just compared; a Routing's order and offsets hold
        // pairs and experts below its sizes.
        unsafe { exec.execute(&raw, cost) }
    }
}

/// Down projection with the weighted sum over a token's experts.
pub mod down {
    use super::Routing;
    use crate::activations::Rows;
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, ViewMut, Weight};

    operator!(
        "moe_down",
        q3n_moe_down_args,
        q3n_moe_down_check,
        q3n_moe_down_variant_count,
        q3n_moe_down_variant_at,
        q3n_moe_down_best
    );

    /// Arguments of [`run`].
    pub struct Args<'a> {
        /// Output, `[T][D]`.
        pub y: ViewMut<'a, 2>,
        /// Hidden activations, `[T * top_k][F]`, packed; f32 or quantised for down.
        pub h: Rows<'a>,
        /// Down projections, `[E][D][F]`.
        pub down: Weight<'a, 3>,
        /// Who goes where.
        pub routing: &'a Routing,
        /// Add to y instead of overwriting it.
        pub accumulate: bool,
    }

    /// y_t = \[y_t +\] Σ weight · Wdown h over the token's choices, in their order. Errors: shapes that do not fit
    /// together, overlapping output strides.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let Routing { tokens, experts, top_k, .. } = *args.routing;
        let (pairs, [_, d, f]) = (tokens * top_k, args.down.shape());
        args.y.expect("y", [tokens, d])?;
        args.down.expect("down", [experts, d, f])?;
        args.h.expect("h", [pairs, f])?;
        if pairs > 1 && f > 0 && args.h.stride() != f as i64 {
            return Err(Error::argument("h", "has gaps between its rows"));
        }
        let raw = ffi::q3n_moe_down_args {
            struct_bytes: size_of::<ffi::q3n_moe_down_args>() as u64,
            y: args.y.as_mut_ptr(),
            h: args.h.as_ptr(),
            weights: args.routing.weights().map_or(std::ptr::null(), <[f32]>::as_ptr),
            down: args.down.as_ptr(),
            order: args.routing.order.as_ptr(),
            offsets: args.routing.offsets.as_ptr(),
            dtype: args.down.dtype().0,
            h_dtype: args.h.dtype().0,
            accumulate: args.accumulate.into(),
            y_t: args.y.stride(0),
            down_e: args.down.stride(0),
            down_d: args.down.stride(1),
            T: tokens as i64,
            E: experts as i64,
            top_k: top_k as i64,
            D: d as i64,
            F: f as i64,
        };
        let cost = (pairs + 2 * pairs.min(experts)).saturating_mul(d).saturating_mul(f.saturating_mul(2));
        // SAFETY: every view lies inside its slice and has the shape just compared; a Routing's order and offsets hold
        // pairs and experts below its sizes.
        unsafe { exec.execute(&raw, cost) }
    }
}
