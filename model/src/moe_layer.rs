//! The feed-forward: routed experts and the shared one, or a dense SwiGLU.

use crate::config::Config;
use crate::error::Error;
use crate::ubatch::{project, sigmoid};
use crate::weights::{Ffn, Swiglu, Tensor};
use qwen3next_kernels::moe::{self, Routing};
use qwen3next_kernels::{Exec, View, ViewMut, Weight};

/// x += ffn(normed).
pub(crate) fn add(config: &Config, ffn: &Ffn, normed: &[f32], x: &mut [f32]) -> Result<(), Error> {
    let (width, mut h) = (config.hidden, Vec::new());
    let t = x.len() / width;
    match ffn {
        Ffn::Dense(w) => swiglu(w, Routing::dense(t, None)?, normed, x, &mut h),
        Ffn::Moe(w) => {
            let mut logits = vec![0.0f32; t * config.moe.experts];
            project(&w.router, normed, &mut logits)?;
            let logits = View::new(&logits, [t, config.moe.experts])?;
            let routing = Routing::route(logits, config.moe.top_k, config.moe.normalize, &Exec::default())?;
            feed(&w.gate, &w.up, &w.down, &routing, normed, x, &mut h)?;
            let Some(shared) = &w.shared else { return Ok(()) };
            let weights = normed.chunks_exact(width).map(|row| {
                let dot: f64 = row.iter().zip(&shared.gate_vec).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                sigmoid(dot as f32)
            });
            swiglu(&shared.expert, Routing::dense(t, Some(weights.collect()))?, normed, x, &mut h)
        }
    }
}

fn swiglu(w: &Swiglu, routing: Routing, normed: &[f32], x: &mut [f32], h: &mut Vec<f32>) -> Result<(), Error> {
    feed(&w.gate, &w.up, &w.down, &routing, normed, x, h)
}

fn feed(
    gate: &Tensor,
    up: &Tensor,
    down: &Tensor,
    routing: &Routing,
    normed: &[f32],
    x: &mut [f32],
    h: &mut Vec<f32>,
) -> Result<(), Error> {
    let (t, width) = (routing.tokens(), gate.cols());
    let args = moe::Args {
        y: ViewMut::new(x, [t, width])?,
        x: View::new(normed, [t, width])?,
        gate: experts(gate)?,
        up: experts(up)?,
        down: experts(down)?,
        routing,
        accumulate: true,
        h,
    };
    Ok(moe::run(args, &moe::Execs::default())?)
}

fn experts(w: &Tensor) -> Result<Weight<'_, 3>, Error> {
    Ok(Weight::strided(w.bytes(), w.dtype(), w.shape(), [w.expert_stride(), w.row_stride(), 1])?)
}
