//! The feed-forward: routed experts and the shared one, or a dense SwiGLU.

use crate::config::Config;
use crate::error::Error;
use crate::ubatch::{project, sigmoid, Buffers, Input};
use crate::weights::{Ffn, Tensor};
use qwen3next_kernels::moe::{self, Routing};
use qwen3next_kernels::{Exec, View, ViewMut, Weight};
use rayon::prelude::*;

/// x += ffn(normed).
pub(crate) fn add(
    config: &Config,
    ffn: &Ffn,
    quantize: bool,
    normed: &[f32],
    buffers: &mut Buffers,
    x: &mut [f32],
) -> Result<(), Error> {
    let width = config.hidden;
    let t = x.len() / width;
    match ffn {
        Ffn::Dense(w) => {
            let input = Input::new(normed, width, quantize, [&w.gate, &w.up], buffers)?;
            let mut routing = std::mem::take(&mut buffers.dense);
            routing.dense_again((0..t).map(|_| 1.0))?;
            feed(&w.gate, &w.up, &w.down, &routing, &input, buffers, x)?;
            buffers.dense = routing;
            input.give(buffers);
        }
        Ffn::Moe(w) => {
            let shared = w.shared.iter().flat_map(|s| [&s.expert.gate, &s.expert.up]);
            let weights = [&w.router, &w.gate, &w.up].into_iter().chain(shared);
            let input = Input::new(normed, width, quantize, weights, buffers)?;
            let mut logits = buffers.take(t * config.moe.experts);
            project(&w.router, &input, &mut logits)?;
            let rows = View::new(&logits, [t, config.moe.experts])?;
            let mut routing = std::mem::take(&mut buffers.routing);
            routing.route_again(rows, config.moe.top_k, config.moe.normalize, &Exec::default())?;
            buffers.give(logits);
            feed(&w.gate, &w.up, &w.down, &routing, &input, buffers, x)?;
            buffers.routing = routing;
            if let Some(shared) = &w.shared {
                let gate = |row: &[f32]| {
                    let dot: f64 = row.iter().zip(&shared.gate_vec).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    sigmoid(dot as f32)
                };
                let mut weights = buffers.take(t);
                let rows = input.floats();
                match t {
                    0..16 => weights.iter_mut().zip(rows.chunks_exact(width)).for_each(|(w, row)| *w = gate(row)),
                    _ => weights.par_iter_mut().zip(rows.par_chunks_exact(width)).for_each(|(w, row)| *w = gate(row)),
                }
                let mut routing = std::mem::take(&mut buffers.dense);
                routing.dense_again(weights.iter().copied())?;
                let w = &shared.expert;
                feed(&w.gate, &w.up, &w.down, &routing, &input, buffers, x)?;
                buffers.dense = routing;
                buffers.give(weights);
            }
            input.give(buffers);
        }
    }
    Ok(())
}

/// x += routed experts(normed), for a routing that was made elsewhere.
#[cfg(feature = "device")]
pub(crate) fn add_routed(
    w: &crate::weights::Moe,
    routing: &Routing,
    quantize: bool,
    normed: &[f32],
    buffers: &mut Buffers,
    x: &mut [f32],
) -> Result<(), Error> {
    let input = Input::new(normed, w.gate.cols(), quantize, [&w.gate, &w.up], buffers)?;
    feed(&w.gate, &w.up, &w.down, routing, &input, buffers, x)?;
    input.give(buffers);
    Ok(())
}

fn feed(
    gate: &Tensor,
    up: &Tensor,
    down: &Tensor,
    routing: &Routing,
    input: &Input,
    buffers: &mut Buffers,
    x: &mut [f32],
) -> Result<(), Error> {
    let (t, width) = (routing.tokens(), gate.cols());
    let args = moe::Args {
        y: ViewMut::new(x, [t, width])?,
        x: input.rows(&[gate, up])?,
        gate: experts(gate)?,
        up: experts(up)?,
        down: experts(down)?,
        routing,
        accumulate: true,
        h: &mut buffers.hidden,
    };
    Ok(moe::run(args, &moe::Execs::default())?)
}

fn experts(w: &Tensor) -> Result<Weight<'_, 3>, Error> {
    Ok(Weight::strided(w.bytes(), w.dtype(), w.shape(), [w.expert_stride(), w.row_stride(), 1])?)
}
