//! A number that tells models apart.

use crate::config::Config;
use crate::weights::{Ffn, Mixer, Swiglu, Tensor, Weights};
use std::hash::Hasher;
use twox_hash::XxHash3_64;

/// XXH3 of the sizes, every vector, and of every matrix its type, shape and some bytes at both ends and in the middle:
/// no secret seal, but another training, merge or quantisation gives another number. Reads little of a mapped file.
pub(crate) fn of(config: &Config, weights: &Weights) -> u64 {
    let mut sum = Sum(XxHash3_64::new());
    sum.0.write(format!("{config:?}").as_bytes());
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
        const SAMPLE: usize = 64;
        self.0.write(tensor.dtype().name().as_bytes());
        tensor.shape().into_iter().for_each(|n| self.0.write(&(n as u64).to_le_bytes()));
        let last = tensor.experts().saturating_sub(1);
        for expert in [0, last / 2, last] {
            let Some(matrix) = tensor.expert(expert) else { continue };
            let bytes = matrix.bytes();
            let room = bytes.len().saturating_sub(SAMPLE);
            for at in [0, room / 2, room] {
                self.0.write(&bytes[at..bytes.len().min(at + SAMPLE)]);
            }
        }
    }
}
