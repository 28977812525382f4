//! Gated full attention: projections, q and k norms, rotary embedding, KV cache, attention, output projection.

use crate::cache::Rows;
use crate::config::Config;
use crate::error::Error;
use crate::ubatch::{add_rows, project, project_rows, Buffers, Input, Packed};
use crate::weights::Attention;
use qwen3next_kernels::attention;
use qwen3next_kernels::{norm, rope, Exec, View, ViewMut};

/// x += layer(normed). `keys` and `values` are the caches, `[slots][S][HKV][D]`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn add(
    config: &Config,
    w: &Attention,
    keys: &mut Rows,
    values: &mut Rows,
    packed: &Packed,
    normed: &[f32],
    buffers: &mut Buffers,
    x: &mut [f32],
) -> Result<(), Error> {
    let a = &config.attention;
    let (t, hq, hkv, d) = (packed.tokens, a.heads, a.kv_heads, a.head_dim);
    let entry = packed.capacity * hkv * d;
    let slots = keys.len() / entry.max(1);

    // Per head the D channels of q, then the D channels of the gate.
    let input = Input::new(normed, config.hidden, packed.quantize, [&w.q, &w.k, &w.v], buffers)?;
    let mut qg = buffers.take(t * hq * 2 * d);
    project(&w.q, &input, &mut qg)?;
    let mut k = buffers.take(t * hkv * d);
    project(&w.k, &input, &mut k)?;
    let mut v = buffers.take(t * hkv * d);
    project(&w.v, &input, &mut v)?;
    input.give(buffers);

    prepare(config, &mut qg, [t, hq, d], 2 * d, &w.q_norm, packed)?;
    prepare(config, &mut k, [t, hkv, d], d, &w.k_norm, packed)?;

    let row = hkv * d;
    for (b, &slot) in packed.slots.iter().enumerate() {
        let (from, to) = (packed.cu_seqlens[b] as usize, packed.cu_seqlens[b + 1] as usize);
        if from < to {
            // A sequence's positions follow one another.
            let at = slot as usize * entry + packed.positions[from] as usize * row;
            keys.write(at, &k[from * row..to * row], row)?;
            values.write(at, &v[from * row..to * row], row)?;
        }
    }

    let mut o = buffers.take(t * hq * d);
    let cache = [slots, packed.capacity, hkv, d];
    let strides = [t * hq * 2 * d, hq * 2 * d, 2 * d, 1];
    attention::run_split(
        attention::Args {
            o: ViewMut::new(&mut o, [1, t, hq, d])?,
            lse: None,
            q: View::strided(&qg, [1, t, hq, d], strides)?,
            k: keys.view(cache)?,
            v: values.view(cache)?,
            gate: Some(View::strided(&qg[d..], [1, t, hq, d], strides)?),
            mask: None,
            sinks: None,
            slot: Some(&packed.slots),
            kv_len: Some(&packed.lengths),
            cu_seqlens: Some(&packed.cu_seqlens),
            causal: true,
            scale: (1.0 / (d as f64).sqrt()) as f32,
            window: None,
        },
        &Exec::default(),
    )?;
    let mut y = buffers.take(x.len());
    project_rows(&w.o, &o, &mut y, packed.quantize, buffers)?;
    add_rows(x, &y);
    [qg, k, v, o, y].into_iter().for_each(|buffer| buffers.give(buffer));
    Ok(())
}

/// Norms and rotates every head in place; heads lie `stride` apart.
fn prepare(
    config: &Config,
    heads: &mut [f32],
    shape: [usize; 3],
    stride: usize,
    w: &[f32],
    packed: &Packed,
) -> Result<(), Error> {
    let (a, strides) = (&config.attention, [shape[1] * stride, stride, 1]);
    let y = ViewMut::strided(heads, shape, strides)?;
    norm::run(
        norm::Args { y, x: None, kind: norm::Kind::Rms(Some(w.into())), eps: config.norm_eps },
        &Exec::default(),
    )?;
    let y = ViewMut::strided(heads, shape, strides)?;
    let args = rope::Args { y, x: None, pos: &packed.positions, base: a.rope_base, rotary: a.rotary };
    Ok(rope::run(args, &Exec::default())?)
}
