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
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::device::{Cuda, Device, Stream};
use crate::memory::{Cpu, Memory};
use crate::{DType, Error, Exec, View, ViewMut, Weight};

/// Which tokens go to which experts, with which weights. Made only by the router or from checked ids, so the
/// grouping in it is always valid.
#[derive(Debug)]
pub struct Routing<M: Memory = Cpu> {
    tokens: usize,
    experts: usize,
    top_k: usize,
    ids: M::Vec<i32>,
    weights: Option<M::Vec<f32>>,
    order: M::Vec<i64>,
    offsets: M::Vec<i64>,
}

impl Clone for Routing {
    fn clone(&self) -> Self {
        Routing {
            ids: self.ids.clone(),
            weights: self.weights.clone(),
            order: self.order.clone(),
            offsets: self.offsets.clone(),
            ..*self
        }
    }
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

impl<M: Memory> Routing<M> {
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
}

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
impl Routing<Cuda> {
    /// No tokens, no experts.
    pub fn on(device: &Device) -> Result<Self, Error> {
        Ok(Routing {
            tokens: 0,
            experts: 0,
            top_k: 0,
            ids: device.zeros(0)?,
            weights: None,
            order: device.zeros(0)?,
            offsets: device.upload(&[0])?,
        })
    }

    /// A routing made on the CPU.
    pub fn upload(device: &Device, routing: &Routing) -> Result<Self, Error> {
        Ok(Routing {
            tokens: routing.tokens,
            experts: routing.experts,
            top_k: routing.top_k,
            ids: device.upload(&routing.ids)?,
            weights: routing.weights.as_ref().map(|w| device.upload(w)).transpose()?,
            order: device.upload(&routing.order)?,
            offsets: device.upload(&routing.offsets)?,
        })
    }

    /// Replaces the contents as [`Routing::route`] would: queues router and grouping. Allocates where these are more
    /// pairs than ever before. A token with a NaN logit goes to the first experts with NaN as weights, which `bad_token`
    /// tells: one value, lowered to the first such token.
    pub fn queue_route(
        &mut self,
        logits: View<2, f32, Cuda>,
        top_k: usize,
        normalize: bool,
        bad_token: ViewMut<1, i64, Cuda>,
        stream: &Stream,
    ) -> Result<(), Error> {
        let [tokens, experts] = logits.shape();
        if top_k == 0 || top_k > experts || experts > MAX_EXPERTS {
            return Err(Error::argument("top_k", format!("{top_k} of {experts} experts, at most {MAX_EXPERTS}")));
        }
        let pairs = pairs(tokens, top_k)?;
        (self.tokens, self.experts, self.top_k) = (0, 0, 0);
        if self.weights.is_none() {
            self.weights = Some(stream.device().zeros(0)?);
        }
        let weights = self.weights.as_mut().expect("made just above");
        weights.reserve(pairs)?;
        self.ids.reserve(pairs)?;
        self.order.reserve(pairs)?;
        self.offsets.reserve(experts + 1)?;
        let route = route::CudaArgs {
            ids: self.ids.view_mut([tokens, top_k])?,
            weights: weights.view_mut([tokens, top_k])?,
            bad_token,
            logits,
            normalize,
        };
        route::queue(route, stream)?;
        let group = group::CudaArgs {
            order: self.order.view_mut([pairs])?,
            offsets: self.offsets.view_mut([experts + 1])?,
            ids: self.ids.view([tokens, top_k])?,
        };
        group::queue(group, stream)?;
        (self.tokens, self.experts, self.top_k) = (tokens, experts, top_k);
        Ok(())
    }

    /// As [`Routing::dense_again`]: every token to the only expert. The weights, `[tokens]`, are for the caller to fill.
    pub fn dense_on(&mut self, tokens: usize, device: &Device) -> Result<ViewMut<'_, 1, f32, Cuda>, Error> {
        if [self.tokens, self.experts, self.top_k] != [tokens, 1, 1] || self.weights.is_none() {
            *self = Routing::upload(device, &Routing::dense(tokens, Some(vec![1.0; tokens]))?)?;
        }
        self.weights.as_mut().expect("made just above").view_mut([tokens])
    }

    /// Chosen experts, `[T][top_k]`.
    pub fn ids(&self) -> &crate::device::Buffer<i32> {
        &self.ids
    }

    /// Their weights, `[T][top_k]`; `None`: all 1.
    pub fn weights(&self) -> Option<&crate::device::Buffer<f32>> {
        self.weights.as_ref()
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
pub struct Args<'a, M: Memory = Cpu> {
    /// Output, `[T][D]`.
    pub y: ViewMut<'a, 2, f32, M>,
    /// Activations, `[T][D]`, f32 or quantised for gate and up. The hidden activations follow them: f32, or quantised
    /// for down.
    pub x: Rows<'a, M>,
    /// Gate projections, `[E][F][D]`; a merged tensor is cut by [`Weight::split_gate_up`].
    pub gate: Weight<'a, 3, M>,
    /// Up projections, `[E][F][D]`.
    pub up: Weight<'a, 3, M>,
    /// Down projections, `[E][D][F]`.
    pub down: Weight<'a, 3, M>,
    /// Who goes where.
    pub routing: &'a Routing<M>,
    /// Add to y instead of overwriting it.
    pub accumulate: bool,
    /// Working memory, which a warm call does not allocate anew. Contents are free.
    pub h: &'a mut Hidden<M>,
}

/// Hidden activations of all pairs, `[T * top_k][F]`: f32 from up, quantised for down where x was.
#[derive(Debug)]
pub struct Hidden<M: Memory = Cpu> {
    floats: M::Vec<f32>,
    quantized: Q8<M>,
}

impl Clone for Hidden {
    fn clone(&self) -> Self {
        Hidden { floats: self.floats.clone(), quantized: self.quantized.clone() }
    }
}

impl Default for Hidden {
    fn default() -> Self {
        Hidden { floats: Vec::new(), quantized: Q8::default() }
    }
}

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
impl Hidden<Cuda> {
    /// None yet.
    pub fn on(device: &Device) -> Result<Self, Error> {
        Ok(Hidden { floats: device.zeros(0)?, quantized: Q8::on(device)? })
    }
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
    let shape @ [pairs, f] = hidden(&args)?;
    let Args { y, x, gate, up, down, routing, accumulate, h } = args;
    if h.floats.len() < pairs * f {
        h.floats.resize(pairs * f, 0.0);
    }
    up::run(up::Args { h: ViewMut::new(&mut h.floats, shape)?, x, gate, up, routing }, &execs.up)?;
    let hidden = View::new(&h.floats, shape)?;
    let suits = down.dtype().activations();
    let hidden = if x.dtype() == DType::F32 || suits == DType::F32 {
        hidden.into()
    } else {
        h.quantized.quantize(suits, hidden, &execs.activations)?;
        (&h.quantized).into()
    };
    down::run(down::Args { y, h: hidden, down, routing, accumulate }, &execs.down)
}

/// As [`run`], on a device: queues it. Allocates where these are more hidden activations than ever before.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub fn queue(args: Args<Cuda>, stream: &Stream) -> Result<(), Error> {
    let shape @ [pairs, f] = hidden(&args)?;
    let Args { y, x, gate, up, down, routing, accumulate, h } = args;
    h.floats.reserve(pairs * f)?;
    up::queue(up::Args { h: h.floats.view_mut(shape)?, x, gate, up, routing }, stream)?;
    let hidden = h.floats.view(shape)?;
    let suits = down.dtype().activations();
    let hidden = if x.dtype() == DType::F32 || suits == DType::F32 {
        hidden.into()
    } else {
        h.quantized.queue(suits, hidden, stream)?;
        (&h.quantized).into()
    };
    down::queue(down::Args { y, h: hidden, down, routing, accumulate }, stream)
}

/// Pairs and F of the hidden activations: shapes are checked before memory is taken for them.
fn hidden<M: Memory>(args: &Args<M>) -> Result<[usize; 2], Error> {
    let Routing { tokens, experts, top_k, .. } = *args.routing;
    let ([_, f, _], pairs) = (args.gate.shape(), tokens * top_k);
    args.down.expect("down", [experts, args.y.shape()[1], f])?;
    args.gate.expect("gate", [experts, f, args.x.shape()[1]])?;
    match pairs.checked_mul(f) {
        Some(_) => Ok([pairs, f]),
        None => Err(Error::argument("gate", format!("F = {f} is too large"))),
    }
}

/// Router logits to experts and weights.
pub mod route {
    use crate::memory::Addresses;
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, View, ViewMut};

    operator!(
        "moe_route",
        q3n_moe_route_args,
        q3n_moe_route_check,
        q3n_moe_route_variant_count,
        q3n_moe_route_variant_at,
        q3n_moe_route_best,
        [
            "cuda",
            q3n_moe_route_cuda,
            q3n_moe_route_cuda_scratch_bytes,
            q3n_moe_route_cuda_host_items,
            q3n_moe_route_cuda_host,
            q3n_moe_route_cuda_host_scratch_bytes
        ]
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
        let mut bad_token = [i64::MAX];
        let mut at = Addresses::new();
        let raw = ffi::q3n_moe_route_args {
            struct_bytes: size_of::<ffi::q3n_moe_route_args>() as u64,
            ids: at.write(&mut ViewMut::new(args.ids, [pairs])?),
            weights: at.write(&mut ViewMut::new(args.weights, [pairs])?),
            bad_token: at.write(&mut ViewMut::new(&mut bad_token, [1])?),
            logits: at.read(&args.logits),
            normalize: args.normalize.into(),
            logits_t: args.logits.stride(0),
            T: tokens as i64,
            E: experts as i64,
            top_k: args.top_k as i64,
        };
        // SAFETY: the outputs hold T * top_k values, the logits' view lies inside its slice; bad_token outlives the
        // call and is written atomically.
        let result = unsafe { exec.execute(&raw, &at, tokens.saturating_mul(experts).saturating_mul(16)) };
        match usize::try_from(bad_token[0]) {
            Ok(token) if token < tokens => Err(Error::Nan { operator: "moe_route", arg: "logits", token }),
            _ => result,
        }
    }

    /// Arguments of [`queue`].
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub struct CudaArgs<'a> {
        /// Output, `[T][top_k]`: chosen experts, largest first.
        pub ids: crate::device::DeviceViewMut<'a, 2, i32>,
        /// Output, `[T][top_k]`: their weights.
        pub weights: crate::device::DeviceViewMut<'a, 2>,
        /// In and output: the smaller of its value and the lowest token that has a NaN logit.
        pub bad_token: crate::device::DeviceViewMut<'a, 1, i64>,
        /// Router logits, `[T][E]`.
        pub logits: crate::device::DeviceView<'a, 2>,
        /// Divide the weights by their sum.
        pub normalize: bool,
    }

    /// As [`run`], on a device: queues it. A NaN is no error here: `bad_token` tells of it.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: CudaArgs, stream: &crate::device::Stream) -> Result<(), Error> {
        let [tokens, experts] = args.logits.shape();
        let [_, top_k] = args.ids.shape();
        args.ids.expect("ids", [tokens, top_k])?;
        args.weights.expect("weights", [tokens, top_k])?;
        args.bad_token.expect("bad_token", [1])?;
        if !args.ids.packed() || !args.weights.packed() {
            return Err(Error::argument("ids", "or weights have gaps, expected packed rows"));
        }
        let mut at = Addresses::new();
        let raw = ffi::q3n_moe_route_args {
            struct_bytes: size_of::<ffi::q3n_moe_route_args>() as u64,
            ids: at.write(&mut args.ids),
            weights: at.write(&mut args.weights),
            bad_token: at.write(&mut args.bad_token),
            logits: at.read(&args.logits),
            normalize: args.normalize.into(),
            logits_t: args.logits.stride(0),
            T: tokens as i64,
            E: experts as i64,
            top_k: top_k as i64,
        };
        // SAFETY: every view lies inside its buffer and has the shape just compared.
        unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
    }
}

/// Pairs of token and choice, sorted by expert.
pub mod group {
    use crate::memory::Addresses;
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, ViewMut};

    operator!(
        "moe_group",
        q3n_moe_group_args,
        q3n_moe_group_check,
        q3n_moe_group_variant_count,
        q3n_moe_group_variant_at,
        q3n_moe_group_best,
        [
            "cuda",
            q3n_moe_group_cuda,
            q3n_moe_group_cuda_scratch_bytes,
            q3n_moe_group_cuda_host_items,
            q3n_moe_group_cuda_host,
            q3n_moe_group_cuda_host_scratch_bytes
        ]
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
        let ends = args.offsets.len();
        let mut at = Addresses::new();
        let raw = ffi::q3n_moe_group_args {
            struct_bytes: size_of::<ffi::q3n_moe_group_args>() as u64,
            order: at.write(&mut ViewMut::new(args.order, [pairs])?),
            offsets: at.write(&mut ViewMut::new(args.offsets, [ends])?),
            ids: at.read(&args.ids.into()),
            T: (pairs / top_k) as i64,
            E: (ends - 1) as i64,
            top_k: top_k as i64,
        };
        // SAFETY: the lengths were just compared with the sizes; ids are checked by the kernel before it writes.
        unsafe { exec.execute(&raw, &at, 0) }
    }

    /// Arguments of [`queue`].
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub struct CudaArgs<'a> {
        /// Output, `[T * top_k]`: the pairs `t * top_k + choice` by expert.
        pub order: crate::device::DeviceViewMut<'a, 1, i64>,
        /// Output, `[E + 1]`: where each expert's pairs start.
        pub offsets: crate::device::DeviceViewMut<'a, 1, i64>,
        /// Chosen experts, `[T][top_k]`, packed.
        pub ids: crate::device::DeviceView<'a, 2, i32>,
    }

    /// As [`run`], on a device: queues it. Where an id lies outside 0..E nothing is written, and nothing tells of it: ids
    /// of [`route`](super::route) never do.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: CudaArgs, stream: &crate::device::Stream) -> Result<(), Error> {
        let [tokens, top_k] = args.ids.shape();
        let [ends] = args.offsets.shape();
        args.order.expect("order", [tokens.saturating_mul(top_k)])?;
        if ends == 0 {
            return Err(Error::argument("offsets", "is empty, expected E + 1 values"));
        }
        if !args.ids.packed() {
            return Err(Error::argument("ids", "has gaps, expected packed rows"));
        }
        let mut at = Addresses::new();
        let raw = ffi::q3n_moe_group_args {
            struct_bytes: size_of::<ffi::q3n_moe_group_args>() as u64,
            order: at.write(&mut args.order),
            offsets: at.write(&mut args.offsets),
            ids: at.read(&args.ids),
            T: tokens as i64,
            E: (ends - 1) as i64,
            top_k: top_k as i64,
        };
        // SAFETY: every view lies inside its buffer and has the shape just compared.
        unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
    }
}

/// Gate and up projections with SwiGLU.
pub mod up {
    use super::Routing;
    use crate::activations::Rows;
    use crate::memory::{Addresses, Cpu, Memory};
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, ViewMut, Weight};

    operator!(
        "moe_up",
        q3n_moe_up_args,
        q3n_moe_up_check,
        q3n_moe_up_variant_count,
        q3n_moe_up_variant_at,
        q3n_moe_up_best,
        [
            "cuda",
            q3n_moe_up_cuda,
            q3n_moe_up_cuda_scratch_bytes,
            q3n_moe_up_cuda_host_items,
            q3n_moe_up_cuda_host,
            q3n_moe_up_cuda_host_scratch_bytes
        ]
    );

    /// Arguments of [`run`].
    pub struct Args<'a, M: Memory = Cpu> {
        /// Output, `[T * top_k][F]`, packed.
        pub h: ViewMut<'a, 2, f32, M>,
        /// Activations, `[T][D]`, f32 or quantised for gate and up.
        pub x: Rows<'a, M>,
        /// Gate projections, `[E][F][D]`.
        pub gate: Weight<'a, 3, M>,
        /// Up projections, `[E][F][D]`.
        pub up: Weight<'a, 3, M>,
        /// Who goes where.
        pub routing: &'a Routing<M>,
    }

    /// h = silu(Wgate x) · Wup x for every pair of token and expert. Errors: shapes that do not fit together.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let (pairs, [experts, f, d]) = (args.routing.ids.len(), args.gate.shape());
        let cost = (2 * pairs + 4 * pairs.min(experts)).saturating_mul(f).saturating_mul(d.saturating_mul(2));
        let (raw, at) = raw(&mut args)?;
        // SAFETY: every view lies inside its slice and has the shape that `raw` compared; a Routing's order and offsets
        // hold pairs and experts below its sizes.
        unsafe { exec.execute(&raw, &at, cost) }
    }

    /// As [`run`], on a device: queues it.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
        let (raw, at) = raw(&mut args)?;
        // SAFETY: as in `run`, with buffers for slices.
        unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
    }

    /// The C args, shapes compared, and where they lie.
    fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_moe_up_args, Addresses<M>), Error> {
        let Routing { tokens, experts, top_k, .. } = *args.routing;
        let [_, f, d] = args.gate.shape();
        args.x.expect("x", [tokens, d])?;
        args.gate.expect("gate", [experts, f, d])?;
        args.up.expect("up", [experts, f, d])?;
        args.h.expect("h", [tokens * top_k, f])?;
        if !args.h.packed() {
            return Err(Error::argument("h", "has gaps between its rows"));
        }
        let mut at = Addresses::new();
        let raw = ffi::q3n_moe_up_args {
            struct_bytes: size_of::<ffi::q3n_moe_up_args>() as u64,
            h: at.write(&mut args.h),
            x: args.x.read(&mut at),
            gate: at.weight(&args.gate),
            up: at.weight(&args.up),
            order: at.read(&M::whole(&args.routing.order)),
            offsets: at.read(&M::whole(&args.routing.offsets)),
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
        Ok((raw, at))
    }
}

/// Down projection with the weighted sum over a token's experts.
pub mod down {
    use super::Routing;
    use crate::activations::Rows;
    use crate::memory::{Addresses, Cpu, Memory};
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, ViewMut, Weight};

    operator!(
        "moe_down",
        q3n_moe_down_args,
        q3n_moe_down_check,
        q3n_moe_down_variant_count,
        q3n_moe_down_variant_at,
        q3n_moe_down_best,
        [
            "cuda",
            q3n_moe_down_cuda,
            q3n_moe_down_cuda_scratch_bytes,
            q3n_moe_down_cuda_host_items,
            q3n_moe_down_cuda_host,
            q3n_moe_down_cuda_host_scratch_bytes
        ]
    );

    /// Arguments of [`run`].
    pub struct Args<'a, M: Memory = Cpu> {
        /// Output, `[T][D]`.
        pub y: ViewMut<'a, 2, f32, M>,
        /// Hidden activations, `[T * top_k][F]`, packed; f32 or quantised for down.
        pub h: Rows<'a, M>,
        /// Down projections, `[E][D][F]`.
        pub down: Weight<'a, 3, M>,
        /// Who goes where.
        pub routing: &'a Routing<M>,
        /// Add to y instead of overwriting it.
        pub accumulate: bool,
    }

    /// y_t = \[y_t +\] Σ weight · Wdown h over the token's choices, in their order. Errors: shapes that do not fit
    /// together, overlapping output strides.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let (pairs, [experts, d, f]) = (args.routing.ids.len(), args.down.shape());
        let cost = (pairs + 2 * pairs.min(experts)).saturating_mul(d).saturating_mul(f.saturating_mul(2));
        let (raw, at) = raw(&mut args)?;
        // SAFETY: every view lies inside its slice and has the shape that `raw` compared; a Routing's order and offsets
        // hold pairs and experts below its sizes.
        unsafe { exec.execute(&raw, &at, cost) }
    }

    /// As [`run`], on a device: queues it.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
        let (raw, at) = raw(&mut args)?;
        // SAFETY: as in `run`, with buffers for slices.
        unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
    }

    /// The C args, shapes compared, and where they lie.
    fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_moe_down_args, Addresses<M>), Error> {
        let Routing { tokens, experts, top_k, .. } = *args.routing;
        let (pairs, [_, d, f]) = (tokens * top_k, args.down.shape());
        args.y.expect("y", [tokens, d])?;
        args.down.expect("down", [experts, d, f])?;
        args.h.expect("h", [pairs, f])?;
        if pairs > 1 && f > 0 && args.h.stride() != f as i64 {
            return Err(Error::argument("h", "has gaps between its rows"));
        }
        let mut at = Addresses::new();
        let raw = ffi::q3n_moe_down_args {
            struct_bytes: size_of::<ffi::q3n_moe_down_args>() as u64,
            y: at.write(&mut args.y),
            h: args.h.read(&mut at),
            weights: args.routing.weights.as_ref().map_or(std::ptr::null(), |w| at.read(&M::whole(w))),
            down: at.weight(&args.down),
            order: at.read(&M::whole(&args.routing.order)),
            offsets: at.read(&M::whole(&args.routing.offsets)),
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
        Ok((raw, at))
    }
}
