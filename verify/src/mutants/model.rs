//! Mutants of the loader and the state: what they hand to the forward pass is changed, the forward pass is the real one.

use crate::cases::model::Change;
use qwen3next_model::config::{Config, HeadMap, LayerKind};
use qwen3next_model::weights::{Ffn, Mixer};
use qwen3next_model::{Error, State, Tensor, Weights};

/// The change that the catalogue lists under this id.
pub fn change(id: &str) -> Change {
    let load = |load| Change { load, ..Change::default() };
    match id {
        "6" => load(exponentiate_a_again),
        "24b" => load(take_heads_for_tiled),
        "25b" => load(add_one_again),
        "26b" => Change { rollback: leave_windows, ..Change::default() },
        "38" => load(drop_shared_gate),
        _ => panic!("mutant {id} has no change"),
    }
}

/// What a loader does that takes `ssm_a` (already −exp(A_log)) for A_log.
fn exponentiate_a_again(_: &mut Config, weights: &mut Weights) {
    for layer in &mut weights.layers {
        if let Mixer::Delta(delta) = &mut layer.mixer {
            delta.a.iter_mut().for_each(|a| *a = -a.exp());
        }
    }
}

fn take_heads_for_tiled(config: &mut Config, _: &mut Weights) {
    config.delta.head_map = HeadMap::Tiled;
}

/// All norms that files may store zero-centred; the gated norm of DeltaNet never is.
fn add_one_again(_: &mut Config, weights: &mut Weights) {
    let add = |w: &mut Vec<f32>| w.iter_mut().for_each(|w| *w += 1.0);
    add(&mut weights.output_norm);
    for layer in &mut weights.layers {
        add(&mut layer.attn_norm);
        add(&mut layer.post_attention_norm);
        if let Mixer::Attention(attention) = &mut layer.mixer {
            add(&mut attention.q_norm);
            add(&mut attention.k_norm);
        }
    }
}

/// Rolls back, then puts the windows of before the rollback back into the slot.
fn leave_windows(config: &Config, state: &mut State, slot: usize, tokens: usize) -> Result<(), Error> {
    let before = state.snapshot(slot)?;
    state.rollback(slot, tokens)?;
    let mut after = state.snapshot(slot)?;
    let windows = config.delta.conv_channels() * (config.delta.conv_width - 1);
    for i in (0..config.layers.len()).filter(|&i| config.layers[i] == LayerKind::Delta) {
        if let (Some(now), Some(then)) = (after.layer_mut(i), before.layer(i)) {
            now[..windows].copy_from_slice(&then[..windows]);
        }
    }
    state.restore(slot, &after)
}

/// No gate is a factor of 1. A gate vector of zeros makes the factor ½, so the last matrix is doubled: exact in f32.
fn drop_shared_gate(_: &mut Config, weights: &mut Weights) {
    for layer in &mut weights.layers {
        let Ffn::Moe(moe) = &mut layer.ffn else { continue };
        let Some(shared) = &mut moe.shared else { continue };
        shared.gate_vec.fill(0.0);
        let down = &shared.expert.down;
        if let Some(values) = down.to_f32() {
            let doubled: Vec<f32> = values.iter().map(|w| 2.0 * w).collect();
            shared.expert.down = Tensor::from_f32(&doubled, down.shape()).expect("the shape it had");
        }
    }
}
