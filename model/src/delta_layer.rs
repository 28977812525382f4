//! Gated DeltaNet: projections, causal convolution, delta rule, gated norm, output projection.

use crate::config::{Config, HeadMap};
use crate::error::Error;
use crate::ubatch::{add_rows, project, project_rows, sigmoid, Buffers, Input, Packed};
use crate::weights::Delta;
use qwen3next_kernels::gated_delta::{self, Gate, LogDecay};
use qwen3next_kernels::{causal_conv, norm, Exec, View, ViewMut};

/// x += layer(normed). `steps` gets, for every token, the window and the delta state after it (where it is not empty).
#[allow(clippy::too_many_arguments)]
pub(crate) fn add(
    config: &Config,
    w: &Delta,
    windows: &mut [f32],
    states: &mut [f32],
    packed: &Packed,
    normed: &[f32],
    buffers: &mut Buffers,
    x: &mut [f32],
    steps: &mut [Vec<f32>],
) -> Result<(), Error> {
    let d = &config.delta;
    let (t, hk, hv, kd, vd) = (packed.tokens, d.k_heads, d.v_heads, d.k_dim, d.v_dim);
    let (channels, values, window) = (d.conv_channels(), d.value_channels(), d.conv_width - 1);

    let input = Input::new(normed, config.hidden, packed.quantize, [&w.qkv, &w.z, &w.ba], buffers)?;
    let mut qkv = buffers.take(t * channels);
    project(&w.qkv, &input, &mut qkv)?;
    let mut z = buffers.take(t * values);
    project(&w.z, &input, &mut z)?;
    let mut ba = buffers.take(t * 2 * hv);
    project(&w.ba, &input, &mut ba)?;
    input.give(buffers);

    // Rows a power of two apart fall into the same sets of every cache: a line between them parts them.
    let row = channels + 16;
    let mut mixed = buffers.take(t * row);
    let mut window_steps = vec![0.0f32; steps.len() * channels * window];
    let slots = windows.len() / (channels * window).max(1);
    causal_conv::run(
        causal_conv::Args {
            y: ViewMut::strided(&mut mixed, [1, t, channels], [t * row, row, 1])?,
            x: View::new(&qkv, [1, t, channels])?,
            w: View::new(&w.conv, [channels, d.conv_width])?,
            bias: None,
            state: match window {
                0 => causal_conv::State::Zeros,
                _ => causal_conv::State::InPlace(ViewMut::new(windows, [slots, channels, window])?),
            },
            snapshots: match window_steps.is_empty() {
                true => None,
                false => Some(ViewMut::new(&mut window_steps, [1, t, channels, window])?),
            },
            slot_in: (window > 0).then_some(packed.slots.as_slice()),
            slot_out: (window > 0).then_some(packed.slots.as_slice()),
            cu_seqlens: Some(&packed.cu_seqlens),
            silu: true,
        },
        &Exec::default(),
    )?;

    let (mut g, mut beta) = (buffers.take(t * hv), buffers.take(t * hv));
    gates(&mut g, &mut beta, d.group(), hv, &ba, w);
    let mut o = buffers.take(t * values);
    let mut state_steps = vec![0.0f32; steps.len() * hv * vd * kd];
    let keys = hk * kd;
    let slots = states.len() / (hv * vd * kd);
    gated_delta::run(
        gated_delta::Args {
            o: ViewMut::new(&mut o, [1, t, hv, vd])?,
            snapshots: match state_steps.is_empty() {
                true => None,
                false => Some(ViewMut::new(&mut state_steps, [1, t, hv, vd, kd])?),
            },
            state: gated_delta::State::InPlace {
                pool: ViewMut::new(states, [slots, hv, vd, kd])?,
                slots: Some(&packed.slots),
            },
            q: View::strided(&mixed, [1, t, hk, kd], [t * row, row, kd, 1])?,
            k: View::strided(&mixed[keys..], [1, t, hk, kd], [t * row, row, kd, 1])?,
            v: View::strided(&mixed[2 * keys..], [1, t, hv, vd], [t * row, row, vd, 1])?,
            gate: Gate::Scalar(LogDecay::unchecked(View::new(&g, [1, t, hv])?)),
            beta: View::new(&beta, [1, t, hv])?,
            cu_seqlens: Some(&packed.cu_seqlens),
            head_map: match d.head_map {
                HeadMap::Grouped => gated_delta::HeadMap::Grouped,
                HeadMap::Tiled => gated_delta::HeadMap::Tiled,
            },
            qk_l2norm: Some(gated_delta::L2_NORM_EPS),
            scale: (1.0 / (kd as f64).sqrt()) as f32,
        },
        &packed.delta,
    )?;

    for (i, step) in steps.iter_mut().enumerate() {
        step.extend_from_slice(&window_steps[i * channels * window..(i + 1) * channels * window]);
        step.extend_from_slice(&state_steps[i * hv * vd * kd..(i + 1) * hv * vd * kd]);
    }

    let gated = norm::Kind::RmsGated { w: Some(View::from(&w.norm[..])), z: View::new(&z, [t, hv, vd])? };
    let args = norm::Args { y: ViewMut::new(&mut o, [t, hv, vd])?, x: None, kind: gated, eps: config.norm_eps };
    norm::run(args, &Exec::default())?;

    let mut y = buffers.take(x.len());
    project_rows(&w.out, &o, &mut y, packed.quantize, buffers)?;
    add_rows(x, &y);
    [qkv, z, ba, mixed, g, beta, o, y].into_iter().for_each(|buffer| buffers.give(buffer));
    Ok(())
}

/// g = a · softplus(α + dt_bias) and β = sigmoid(b), both `[T][HV]`, from rows of `[HK][b × r | α × r]`.
fn gates(g: &mut [f32], beta: &mut [f32], r: usize, hv: usize, ba: &[f32], w: &Delta) {
    let rows = ba.chunks_exact(2 * hv).zip(g.chunks_exact_mut(hv)).zip(beta.chunks_exact_mut(hv));
    for ((row, g), beta) in rows {
        for h in 0..hv {
            let at = h / r * 2 * r + h % r;
            beta[h] = sigmoid(row[at]);
            g[h] = w.a[h] * softplus(row[at + r] + w.dt_bias[h]);
        }
    }
}

/// ln(1 + eˣ), which is x itself where eˣ would drown the 1.
fn softplus(x: f32) -> f32 {
    if x > 20.0 {
        x
    } else {
        x.exp().ln_1p()
    }
}
