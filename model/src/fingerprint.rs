//! A number that tells models apart.

use crate::config::{Config, Mlp};
use crate::weights::{Ffn, Mixer, Swiglu, Tensor, Weights};
use std::hash::Hasher;
use twox_hash::XxHash3_64;

/// XXH3 of the sizes, every vector, and of every matrix its shape and the first, middle and last row of some experts: no
/// secret seal, but another training, merge or quantisation gives another number. Reads little of a mapped file.
///
/// Numbers count, not how a file keeps them: f32, f16 and bf16 that are equal are the same, so that a Hugging Face folder
/// and the GGUF file that `quantize` makes from it without loss are one model.
pub(crate) fn of(config: &Config, weights: &Weights) -> u64 {
    let mut sum = Sum(XxHash3_64::new());
    sum.0.write(format!("{:?}", essential(config)).as_bytes());
    sum.matrix(&weights.token_embd);
    sum.vector(&weights.output_norm);
    sum.matrix(&weights.output);
    for layer in &weights.layers {
        sum.vector(&layer.attn_norm);
        sum.vector(&layer.post_attention_norm);
        match &layer.mixer {
            Mixer::Delta(w) => {
                [&w.qkv, &w.z, &w.ba, &w.out].into_iter().for_each(|t| sum.matrix(t));
                [&w.conv, &w.dt_bias, &w.a, &w.norm].into_iter().for_each(|v| sum.vector(v));
            }
            Mixer::Attention(w) => {
                [&w.q, &w.k, &w.v, &w.o].into_iter().for_each(|t| sum.matrix(t));
                [&w.q_norm, &w.k_norm].into_iter().for_each(|v| sum.vector(v));
            }
        }
        match &layer.ffn {
            Ffn::Dense(w) => sum.swiglu(w),
            Ffn::Moe(w) => {
                [&w.router, &w.gate, &w.up, &w.down].into_iter().for_each(|t| sum.matrix(t));
                if let Some(shared) = &w.shared {
                    sum.vector(&shared.gate_vec);
                    sum.swiglu(&shared.expert);
                }
            }
        }
    }
    sum.0.finish()
}

/// What logits depend on, as precise as every container keeps it.
fn essential(config: &Config) -> Config {
    let mut config = config.clone();
    config.attention.rope_base = f64::from(config.attention.rope_base as f32);
    if !config.mlp.contains(&Mlp::Dense) {
        config.dense_ff = 0;
    }
    // The output matrix is looked at whether it is tied or not.
    Config { context: 0, tied: false, mtp_layers: 0, ..config }
}

struct Sum(XxHash3_64);

impl Sum {
    fn vector(&mut self, values: &[f32]) {
        self.0.write(&(values.len() as u64).to_le_bytes());
        values.iter().for_each(|x| self.0.write(&x.to_le_bytes()));
    }

    fn swiglu(&mut self, w: &Swiglu) {
        [&w.gate, &w.up, &w.down].into_iter().for_each(|t| self.matrix(t));
    }

    fn matrix(&mut self, tensor: &Tensor) {
        tensor.shape().into_iter().for_each(|n| self.0.write(&(n as u64).to_le_bytes()));
        let (last, last_row) = (tensor.experts().saturating_sub(1), tensor.rows().saturating_sub(1));
        for expert in [0, last / 2, last] {
            let Some(matrix) = tensor.expert(expert) else { continue };
            for row in [0, last_row / 2, last_row] {
                let Some(row) = matrix.row_range(row, 1) else { continue };
                match row.to_f32() {
                    Some(values) => self.vector(&values),
                    None => {
                        self.0.write(row.dtype().name().as_bytes());
                        self.0.write(row.bytes());
                    }
                }
            }
        }
    }
}
