//! The sparse feed-forward, step by step.

use super::{blocks, reference, repeated, unit, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::moe::{Case, Crowd, GroupCase, Logits, MoeDown, MoeGroup, MoeRoute, MoeUp, RouteCase};
use crate::cases::normal;
use crate::cases::quant::{Form, Type};
use crate::compare::{Failure, Metrics};
use crate::guard::Guarded;
use crate::peaks::Unit;
use crate::suite::{rng, Rng};
use qwen3next_kernels::activations::Rows;
use qwen3next_kernels::moe::{down, group, route, up, Routing};
use qwen3next_kernels::{Exec, Variant, View, ViewMut, Weight};
use rand::seq::SliceRandom;
use rand::Rng as _;

/// Sizes of a feed-forward.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Tokens.
    pub t: usize,
    /// Experts.
    pub e: usize,
    /// Experts a token chooses.
    pub top_k: usize,
    /// Model width.
    pub d: usize,
    /// Expert width.
    pub f: usize,
}

impl Sizes {
    /// Distinct experts for every token.
    fn ids(&self, rng: &mut Rng) -> Vec<i32> {
        let mut experts: Vec<i32> = (0..self.e as i32).collect();
        let mut one = |_| experts.partial_shuffle(rng, self.top_k).0.to_vec();
        (0..self.t).flat_map(&mut one).collect()
    }

    fn routing(&self, rng: &mut Rng) -> Routing {
        let ids = self.ids(rng);
        let weights = ids.iter().map(|_| rng.random_range(0.0f32..1.0)).collect();
        Routing::from_ids(self.e, self.top_k, ids, Some(weights)).expect("ids below the number of experts")
    }

    fn pairs(&self) -> usize {
        self.t * self.top_k
    }

    /// Products of the pairs with `matrices` of F × D.
    fn ops(&self, matrices: usize) -> f64 {
        2.0 * (matrices * self.pairs()) as f64 * (self.f * self.d) as f64
    }

    /// Few experts, and the axis that is not summed cut to one block: float64 takes its time.
    fn case(&self, dtype: Type, form: Form, sum_over_d: bool) -> Case {
        let whole = |n| blocks(n, dtype.dtype());
        let cut = |n: usize| whole(n.min(dtype.dtype().block().max(40)));
        Case {
            t: self.t.min(9),
            e: self.e.min(self.top_k + 2),
            top_k: self.top_k,
            d_blocks: if sum_over_d { whole(self.d) } else { cut(self.d) },
            f_blocks: if sum_over_d { cut(self.f) } else { whole(self.f) },
            up_type: dtype,
            down_type: dtype,
            merged: false,
            form,
            layout: Layout::Packed,
            crowd: Crowd::Random,
        }
    }

    fn experts(&self, dtype: Type, rng: &mut Rng) -> Vec<u8> {
        repeated(self.e, 4, |experts| dtype.random(experts * self.f * self.d, 0.1, rng))
    }

    fn touched(&self, routing: &Routing) -> usize {
        routing.offsets().windows(2).filter(|w| w[1] > w[0]).count()
    }
}

/// Router logits to experts and weights.
pub struct Route {
    sizes: Sizes,
    logits: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

impl Route {
    /// Inputs; of the sizes `t`, `e` and `top_k` count.
    pub fn new(sizes: Sizes) -> Route {
        let mut rng = rng(SEED);
        let logits = (0..sizes.t * sizes.e).map(|_| normal(&mut rng)).collect();
        Route { logits, ids: vec![0; sizes.pairs()], weights: vec![0.0; sizes.pairs()], sizes }
    }
}

impl Timed for Route {
    type Op = route::Op;

    fn judge(&self, variant: &Variant<route::Op>) -> Result<Metrics, Failure> {
        let Sizes { t, e, top_k, .. } = self.sizes;
        let (layout, logits) = (Layout::Packed, Logits::Mild);
        reference::<MoeRoute>(variant, &RouteCase { t: t.min(64), e, top_k, normalize: true, layout, logits })
    }

    fn run(&mut self, exec: &Exec<route::Op>) -> Result<(), Failure> {
        let Sizes { t, e, top_k, .. } = self.sizes;
        let logits = View::new(&self.logits, [t, e])?;
        let (ids, weights) = (&mut self.ids, &mut self.weights);
        Ok(route::run(route::Args { ids, weights, logits, top_k, normalize: true }, exec)?)
    }

    /// Maximum, difference, exponential and sum a logit, a comparison for the choice.
    fn work(&self) -> Work {
        Work { ops: 5.0 * self.logits.len() as f64, bytes: (4 * self.logits.len() + 8 * self.ids.len()) as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.weights
    }
}

/// Pairs of token and choice, sorted by expert.
pub struct Group {
    sizes: Sizes,
    ids: Vec<i32>,
    order: Vec<i64>,
    offsets: Vec<i64>,
}

impl Group {
    /// Inputs; of the sizes `t`, `e` and `top_k` count.
    pub fn new(sizes: Sizes) -> Group {
        let ids = sizes.ids(&mut rng(SEED));
        Group { order: vec![0; ids.len()], offsets: vec![0; sizes.e + 1], ids, sizes }
    }
}

impl Timed for Group {
    type Op = group::Op;

    fn judge(&self, variant: &Variant<group::Op>) -> Result<Metrics, Failure> {
        let Sizes { t, e, top_k, .. } = self.sizes;
        reference::<MoeGroup>(variant, &GroupCase { t, e, top_k, crowd: Crowd::Random })
    }

    fn run(&mut self, exec: &Exec<group::Op>) -> Result<(), Failure> {
        let (order, offsets) = (&mut self.order, &mut self.offsets);
        Ok(group::run(group::Args { order, offsets, ids: &self.ids, top_k: self.sizes.top_k }, exec)?)
    }

    /// A count and a place an id.
    fn work(&self) -> Work {
        let bytes = 4 * self.ids.len() + 8 * (self.order.len() + self.offsets.len());
        Work { ops: 2.0 * self.ids.len() as f64, bytes: bytes as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut []
    }
}

/// Gate and up projections with SwiGLU.
pub struct Up {
    sizes: Sizes,
    dtype: Type,
    form: Form,
    routing: Routing,
    x: Vec<f32>,
    q8: Option<Guarded<u8>>,
    gate: Vec<u8>,
    up: Vec<u8>,
    h: Vec<f32>,
}

impl Up {
    /// Inputs; widths are multiples of the type's block. `form` as far as the type allows it.
    pub fn new(sizes: Sizes, dtype: Type, form: Form) -> Result<Up, Failure> {
        let mut rng = rng(SEED);
        let form = form.for_weights(dtype.dtype(), sizes.f);
        let x: Vec<f32> = (0..sizes.t * sizes.d).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        Ok(Up {
            routing: sizes.routing(&mut rng),
            q8: form.activations(View::new(&x, [sizes.t, sizes.d])?, dtype.dtype())?,
            x,
            gate: form.weights(&sizes.experts(dtype, &mut rng), dtype.dtype(), sizes.d).0,
            up: form.weights(&sizes.experts(dtype, &mut rng), dtype.dtype(), sizes.d).0,
            h: vec![0.0; sizes.pairs() * sizes.f],
            dtype,
            form,
            sizes,
        })
    }
}

impl Timed for Up {
    type Op = up::Op;

    fn judge(&self, variant: &Variant<up::Op>) -> Result<Metrics, Failure> {
        reference::<MoeUp>(variant, &self.sizes.case(self.dtype, self.form, true))
    }

    fn run(&mut self, exec: &Exec<up::Op>) -> Result<(), Failure> {
        let Sizes { t, e, d, f, .. } = self.sizes;
        let dtype = self.form.weight_type(self.dtype.dtype());
        let args = up::Args {
            h: ViewMut::new(&mut self.h, [self.routing.ids().len(), f])?,
            x: match &self.q8 {
                Some(bytes) => Rows::Q8(Weight::new(bytes, self.dtype.dtype().activations(), [t, d])?),
                None => View::new(&self.x, [t, d])?.into(),
            },
            gate: Weight::new(&self.gate, dtype, [e, f, d])?,
            up: Weight::new(&self.up, dtype, [e, f, d])?,
            routing: &self.routing,
        };
        Ok(up::run(args, exec)?)
    }

    /// Weights of the experts that are chosen at all.
    fn work(&self) -> Work {
        let weights = 2 * self.gate.len() / self.sizes.e * self.sizes.touched(&self.routing);
        Work { ops: self.sizes.ops(2), bytes: (weights + 4 * (self.x.len() + self.h.len())) as f64 }
    }

    fn unit(&self, variant: &Variant<up::Op>) -> Unit {
        unit(self.form, variant.isa())
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.h
    }
}

/// Down projection with the weighted sum over a token's experts.
pub struct Down {
    sizes: Sizes,
    dtype: Type,
    form: Form,
    routing: Routing,
    h: Vec<f32>,
    q8: Option<Guarded<u8>>,
    down: Vec<u8>,
    y: Vec<f32>,
}

impl Down {
    /// Inputs; widths are multiples of the type's block. `form` as far as the type allows it.
    pub fn new(sizes: Sizes, dtype: Type, form: Form) -> Result<Down, Failure> {
        let mut rng = rng(SEED);
        let form = form.for_weights(dtype.dtype(), sizes.d);
        let h: Vec<f32> = (0..sizes.pairs() * sizes.f).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        Ok(Down {
            routing: sizes.routing(&mut rng),
            q8: form.activations(View::new(&h, [sizes.pairs(), sizes.f])?, dtype.dtype())?,
            h,
            down: form.weights(&sizes.experts(dtype, &mut rng), dtype.dtype(), sizes.f).0,
            y: vec![0.0; sizes.t * sizes.d],
            dtype,
            form,
            sizes,
        })
    }
}

impl Timed for Down {
    type Op = down::Op;

    fn judge(&self, variant: &Variant<down::Op>) -> Result<Metrics, Failure> {
        reference::<MoeDown>(variant, &self.sizes.case(self.dtype, self.form, false))
    }

    fn run(&mut self, exec: &Exec<down::Op>) -> Result<(), Failure> {
        let Sizes { t, e, d, f, .. } = self.sizes;
        let args = down::Args {
            y: ViewMut::new(&mut self.y, [t, d])?,
            h: match &self.q8 {
                Some(bytes) => Rows::Q8(Weight::new(bytes, self.dtype.dtype().activations(), [self.sizes.pairs(), f])?),
                None => View::new(&self.h, [self.sizes.pairs(), f])?.into(),
            },
            down: Weight::new(&self.down, self.form.weight_type(self.dtype.dtype()), [e, d, f])?,
            routing: &self.routing,
            accumulate: false,
        };
        Ok(down::run(args, exec)?)
    }

    /// Weights of the experts that are chosen at all.
    fn work(&self) -> Work {
        let weights = self.down.len() / self.sizes.e * self.sizes.touched(&self.routing);
        Work { ops: self.sizes.ops(1), bytes: (weights + 4 * (self.h.len() + self.y.len())) as f64 }
    }

    fn unit(&self, variant: &Variant<down::Op>) -> Unit {
        unit(self.form, variant.isa())
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.y
    }
}
