//! Layers on a CUDA device: which ones, and their weights there.

use crate::config::Config;
use crate::error::Error;
use crate::weights::{self, Ffn, Mixer, Tensor, Weights};
use qwen3next_kernels::device::{Buffer, Cuda, Device};
use qwen3next_kernels::{DType, Weight};

/// What lies on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Layers, the last ones first; more than the model has: the output matrix too.
    pub layers: usize,
    /// Of the first so many layers the experts stay in the CPU's memory and are computed there.
    pub cpu_experts: usize,
}

impl Placement {
    /// All of it.
    pub const ALL: Placement = Placement { layers: usize::MAX, cpu_experts: 0 };

    /// Layers of `config` that lie on the device: from this one on.
    pub(crate) fn first(&self, config: &Config) -> usize {
        config.layers.len().saturating_sub(self.layers)
    }
}

/// A matrix, or one an expert, in a device's memory, packed.
#[derive(Debug)]
pub(crate) struct Matrix {
    bytes: Buffer<u8>,
    dtype: DType,
    shape: [usize; 3],
}

impl Matrix {
    fn upload(device: &Device, w: &Tensor) -> Result<Matrix, Error> {
        let [experts, rows, _] = w.shape();
        let matrix = rows * w.row_bytes();
        let mut bytes = device.zeros(w.packed_bytes())?;
        let stride = w.dtype().bytes(w.expert_stride()).unwrap_or(0);
        if experts <= 1 || stride == matrix {
            bytes.write(w.bytes())?;
        } else {
            for e in 0..experts {
                bytes.write_at(e * matrix, w.bytes().get(e * stride..e * stride + matrix).unwrap_or(&[]))?;
            }
        }
        Ok(Matrix { bytes, dtype: w.dtype(), shape: w.shape() })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn rows(&self) -> usize {
        self.shape[1]
    }

    pub fn cols(&self) -> usize {
        self.shape[2]
    }

    /// As one matrix.
    pub fn view(&self) -> Result<Weight<'_, 2, Cuda>, Error> {
        Ok(self.bytes.weight(self.dtype, [self.shape[0] * self.shape[1], self.shape[2]])?)
    }

    /// `[experts][rows][cols]`.
    pub fn experts(&self) -> Result<Weight<'_, 3, Cuda>, Error> {
        Ok(self.bytes.weight(self.dtype, self.shape)?)
    }
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub attn_norm: Buffer<f32>,
    pub post_attention_norm: Buffer<f32>,
    pub mixer: DeviceMixer,
    /// `None`: the CPU has it.
    pub ffn: Option<DeviceFfn>,
}

#[derive(Debug)]
pub(crate) enum DeviceMixer {
    Delta(Box<Delta>),
    Attention(Box<Attention>),
}

#[derive(Debug)]
pub(crate) struct Delta {
    pub qkv: Matrix,
    pub z: Matrix,
    pub ba: Matrix,
    pub conv: Buffer<f32>,
    pub dt_bias: Buffer<f32>,
    pub a: Buffer<f32>,
    pub norm: Buffer<f32>,
    pub out: Matrix,
}

#[derive(Debug)]
pub(crate) struct Attention {
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub o: Matrix,
    pub q_norm: Buffer<f32>,
    pub k_norm: Buffer<f32>,
}

#[derive(Debug)]
pub(crate) struct Swiglu {
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

#[derive(Debug)]
pub(crate) struct DeviceFfn {
    /// Of routed experts; `None`: one SwiGLU that every token takes.
    pub router: Option<Matrix>,
    pub experts: Swiglu,
    /// The shared expert and its gate.
    pub shared: Option<(Swiglu, Buffer<f32>)>,
}

/// The output norm and matrix.
#[derive(Debug)]
pub(crate) struct Output {
    pub norm: Buffer<f32>,
    pub matrix: Matrix,
}

/// What a model has on a device.
#[derive(Debug)]
pub(crate) struct Offloaded {
    pub device: Device,
    pub first: usize,
    pub layers: Vec<Layer>,
    pub output: Option<Output>,
}

impl Offloaded {
    /// Copies the weights, telling `progress` how many bytes of how many are done.
    pub fn upload(
        config: &Config,
        weights: &Weights,
        device: &Device,
        placement: Placement,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Offloaded, Error> {
        let first = placement.first(config);
        let on_cpu = |i: usize| i < placement.cpu_experts;
        let chosen = || weights.layers.iter().enumerate().skip(first);
        let with_output = placement.layers > config.layers.len();
        let mut total: u64 = chosen().flat_map(|(i, l)| matrices(l, !on_cpu(i))).map(|w| w.packed_bytes() as u64).sum();
        total += if with_output { weights.output.packed_bytes() as u64 } else { 0 };
        let mut done = 0;
        let mut matrix = |w: &Tensor, part: &str| {
            let uploaded = Matrix::upload(device, w).map_err(|e| no_room(e, part, done, total))?;
            done += w.packed_bytes() as u64;
            progress(done, total);
            Ok::<_, Error>(uploaded)
        };
        let vector = |values: &[f32]| device.upload(values);
        let mut layers = Vec::new();
        for (i, layer) in chosen() {
            let mixer = match &layer.mixer {
                Mixer::Delta(w) => DeviceMixer::Delta(Box::new(Delta {
                    qkv: matrix(&w.qkv, "the projections")?,
                    z: matrix(&w.z, "the projections")?,
                    ba: matrix(&w.ba, "the projections")?,
                    conv: vector(&w.conv)?,
                    dt_bias: vector(&w.dt_bias)?,
                    a: vector(&w.a)?,
                    norm: vector(&w.norm)?,
                    out: matrix(&w.out, "the projections")?,
                })),
                Mixer::Attention(w) => DeviceMixer::Attention(Box::new(Attention {
                    q: matrix(&w.q, "the projections")?,
                    k: matrix(&w.k, "the projections")?,
                    v: matrix(&w.v, "the projections")?,
                    o: matrix(&w.o, "the projections")?,
                    q_norm: vector(&w.q_norm)?,
                    k_norm: vector(&w.k_norm)?,
                })),
            };
            let mut swiglu = |w: &weights::Swiglu| {
                Ok::<_, Error>(Swiglu {
                    gate: matrix(&w.gate, "the feed-forward")?,
                    up: matrix(&w.up, "the feed-forward")?,
                    down: matrix(&w.down, "the feed-forward")?,
                })
            };
            let ffn = match &layer.ffn {
                _ if on_cpu(i) => None,
                Ffn::Dense(w) => Some(DeviceFfn { router: None, experts: swiglu(w)?, shared: None }),
                Ffn::Moe(w) => {
                    let shared = w.shared.as_ref();
                    let shared =
                        shared.map(|s| Ok::<_, Error>((swiglu(&s.expert)?, vector(&s.gate_vec)?))).transpose()?;
                    Some(DeviceFfn {
                        experts: Swiglu {
                            gate: matrix(&w.gate, "the experts")?,
                            up: matrix(&w.up, "the experts")?,
                            down: matrix(&w.down, "the experts")?,
                        },
                        router: Some(matrix(&w.router, "the router")?),
                        shared,
                    })
                }
            };
            let attn_norm = vector(&layer.attn_norm)?;
            let post_attention_norm = vector(&layer.post_attention_norm)?;
            layers.push(Layer { attn_norm, post_attention_norm, mixer, ffn });
        }
        let output = match with_output {
            true => Some(Output {
                norm: vector(&weights.output_norm)?,
                matrix: matrix(&weights.output, "the output matrix")?,
            }),
            false => None,
        };
        Ok(Offloaded { device: device.clone(), first, layers, output })
    }

    /// The weights of layer `i` where it lies on the device.
    pub fn layer(&self, i: usize) -> Option<&Layer> {
        self.layers.get(i.checked_sub(self.first)?)
    }
}

/// The matrices of a layer that go to the device.
fn matrices(layer: &weights::Layer, with_ffn: bool) -> Vec<&Tensor> {
    let mut all = match &layer.mixer {
        Mixer::Delta(w) => vec![&w.qkv, &w.z, &w.ba, &w.out],
        Mixer::Attention(w) => vec![&w.q, &w.k, &w.v, &w.o],
    };
    if with_ffn {
        match &layer.ffn {
            Ffn::Dense(w) => all.extend([&w.gate, &w.up, &w.down]),
            Ffn::Moe(w) => {
                all.extend([&w.router, &w.gate, &w.up, &w.down]);
                all.extend(w.shared.iter().flat_map(|s| [&s.expert.gate, &s.expert.up, &s.expert.down]));
            }
        }
    }
    all
}

/// Names the part that did not fit.
fn no_room(error: Error, part: &str, done: u64, total: u64) -> Error {
    Error::argument(
        "device",
        format!(
            "{error}: {part} came after {done} of {total} bytes of weights; fewer layers (-ngl) or more experts on the CPU \
             (--n-cpu-moe) take less, and `fit` reckons how many"
        ),
    )
}
