//! Qwen3-Next's operators as candle `CustomOp`s over [`qwen3next_kernels`], on the CPU and, with the feature `cuda`, on GPUs.
//! Tensors are read where they lie, with any strides, as long as the last axis is contiguous. Work on the CPU is cut over
//! rayon's current pool, which candle uses too; on a GPU it is queued on the stream of candle's device. Outputs carry no
//! gradient. Axes: B sequences, T tokens, HK key heads, HV value heads, K and V channels of a head.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::quantized::{GgmlDType, QTensor};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Storage, Tensor, WithDType};
use qwen3next_kernels::gated_delta::{Gate, HeadMap, LogDecay, State};
use qwen3next_kernels::{attention, causal_conv, gated_delta, moe, DType, Exec, View, ViewMut, Weight};
use std::sync::Arc;

fn wrong(error: qwen3next_kernels::Error) -> Error {
    Error::Msg(error.to_string())
}

/// What a tensor holds, as a view of `R` axes. `name` is the argument in errors.
fn view<'a, const R: usize, T: WithDType>(
    name: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<View<'a, R, T>> {
    let data = storage.as_slice::<T>().map_err(|e| Error::Msg(format!("{name}: {e}")))?;
    let data = data.get(layout.start_offset()..).unwrap_or(&[]);
    let axes = |values: &[usize]| {
        <[usize; R]>::try_from(values).map_err(|_| Error::Msg(format!("{name}: {} axes, expected {R}", values.len())))
    };
    View::strided(data, axes(layout.dims())?, axes(layout.stride())?).map_err(|e| Error::Msg(format!("{name}: {e}")))
}

/// Calls `f` with the storage of a tensor that came beside the operands of a `CustomOp`.
fn with_cpu<R>(name: &str, tensor: &Tensor, f: impl FnOnce(&CpuStorage, &Layout) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(storage, layout),
        _ => Err(Error::Msg(format!("{name}: does not lie on the CPU"))),
    }
}

/// As [`with_cpu`] where there may be no tensor.
fn with_optional<R>(
    name: &str,
    tensor: Option<&Tensor>,
    f: impl FnOnce(Option<(&CpuStorage, &Layout)>) -> Result<R>,
) -> Result<R> {
    match tensor {
        None => f(None),
        Some(tensor) => with_cpu(name, tensor, |storage, layout| f(Some((storage, layout)))),
    }
}

/// The two tensors of an operator that made one storage of both.
fn halves(both: Tensor, first: Shape, second: Shape) -> Result<(Tensor, Tensor)> {
    let (a, b) = (first.elem_count(), second.elem_count());
    Ok((both.narrow(0, 0, a)?.reshape(first)?, both.narrow(0, a, b)?.reshape(second)?))
}

/// The gated delta rule, as in `csrc/gated_delta/gated_delta.h`.
#[derive(Debug, Clone)]
pub struct GatedDelta {
    /// Log-decay: `[B, T, HV]`, `[B, T, HV, K]` or none.
    pub g: Option<Tensor>,
    /// Write strength after the sigmoid, `[B, T, HV]`.
    pub beta: Tensor,
    /// States before the first token, `[B, HV, V, K]`; `None`: zeros.
    pub state: Option<Tensor>,
    /// Which key head a value head reads.
    pub head_map: HeadMap,
    /// Epsilon under the root where q and k are normalised first.
    pub qk_l2norm: Option<f32>,
    /// Factor on q; 1/√K is customary.
    pub scale: f32,
}

impl GatedDelta {
    /// o `[B, T, HV, V]` and the states after the last token `[B, HV, V, K]`, of q, k `[B, T, HK, K]`, v `[B, T, HV, V]`,
    /// all f32. Errors name the argument; a g above 0 is one on the CPU alone, as a GPU's values are not looked at.
    pub fn apply(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, t, hv, vd) = v.dims4()?;
        let kd = q.dims4()?.3;
        halves(q.apply_op3_no_bwd(k, v, self)?, (b, t, hv, vd).into(), (b, hv, vd, kd).into())
    }
}

impl CustomOp3 for GatedDelta {
    fn name(&self) -> &'static str {
        "q3n-gated-delta"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (view("q", q, lq)?, view::<4, f32>("k", k, lk)?, view::<4, f32>("v", v, lv)?);
        let ([b, t, hv, vd], [.., kd]) = (v.shape(), k.shape());
        let outputs = b * t * hv * vd;
        let mut both = vec![0f32; outputs + b * hv * vd * kd];
        let (o, after) = both.split_at_mut(outputs);
        let out = ViewMut::new(after, [b, hv, vd, kd]).map_err(wrong)?;
        with_optional("g", self.g.as_ref(), |g| {
            let gate = match g {
                None => Gate::None,
                Some((g, l)) if l.dims().len() == 3 => Gate::Scalar(decay(g, l)?),
                Some((g, l)) => Gate::Channel(decay(g, l)?),
            };
            with_optional("state", self.state.as_ref(), |state| {
                let input = state.map(|(s, l)| view("state", s, l)).transpose()?;
                with_cpu("beta", &self.beta, |beta, l| {
                    let state = match input {
                        None => State::Zero { out: Some(out), slot_out: None },
                        Some(input) => State::InOut { input, slot_in: None, out: Some(out), slot_out: None },
                    };
                    let args = gated_delta::Args {
                        o: ViewMut::new(o, [b, t, hv, vd]).map_err(wrong)?,
                        snapshots: None,
                        state,
                        q,
                        k,
                        v,
                        gate,
                        beta: view("beta", beta, l)?,
                        cu_seqlens: None,
                        head_map: self.head_map,
                        qk_l2norm: self.qk_l2norm,
                        scale: self.scale,
                    };
                    gated_delta::run(args, &Exec::default()).map_err(wrong)
                })
            })
        })?;
        let count = both.len();
        Ok((CpuStorage::F32(both), count.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        lq: &Layout,
        k: &CudaStorage,
        lk: &Layout,
        v: &CudaStorage,
        lv: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::gated_delta(self, (q, lq), (k, lk), (v, lv))
    }
}

fn decay<'a, const R: usize>(storage: &'a CpuStorage, layout: &Layout) -> Result<LogDecay<'a, R>> {
    // Shape and strides are checked by `view`; the values here.
    view::<R, f32>("g", storage, layout)?;
    let data = &storage.as_slice::<f32>()?[layout.start_offset()..];
    let axes = |values: &[usize]| <[usize; R]>::try_from(values).expect("as many axes as the view above");
    LogDecay::strided(data, axes(layout.dims()), axes(layout.stride())).map_err(wrong)
}

/// Depthwise causal convolution, as in `csrc/causal_conv/causal_conv.h`.
#[derive(Debug, Clone)]
pub struct CausalConv {
    /// `[C]`.
    pub bias: Option<Tensor>,
    /// SiLU after the convolution.
    pub silu: bool,
}

impl CausalConv {
    /// y `[B, T, C]` and the window after the last token `[B, C, W-1]`, of x `[B, T, C]`, taps w `[C, W]` and the window
    /// before the first token, all f32. Errors name the argument.
    pub fn apply(&self, x: &Tensor, w: &Tensor, window: &Tensor) -> Result<(Tensor, Tensor)> {
        let ((b, t, c), (_, width)) = (x.dims3()?, w.dims2()?);
        let after = (b, c, width.saturating_sub(1));
        halves(x.apply_op3_no_bwd(w, window, self)?, (b, t, c).into(), after.into())
    }
}

impl CustomOp3 for CausalConv {
    fn name(&self) -> &'static str {
        "q3n-causal-conv"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        window: &CpuStorage,
        lwindow: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (view("x", x, lx)?, view::<2, f32>("w", w, lw)?);
        let ([b, t, c], [_, width]) = (x.shape(), w.shape());
        let outputs = b * t * c;
        let mut both = vec![0f32; outputs + b * c * width.saturating_sub(1)];
        let (y, after) = both.split_at_mut(outputs);
        let state = causal_conv::State::InOut(
            view("window", window, lwindow)?,
            ViewMut::new(after, [b, c, width.saturating_sub(1)]).map_err(wrong)?,
        );
        with_optional("bias", self.bias.as_ref(), |bias| {
            let bias = bias.map(|(s, l)| view("bias", s, l)).transpose()?;
            let args = causal_conv::Args {
                y: ViewMut::new(y, [b, t, c]).map_err(wrong)?,
                x,
                w,
                bias,
                state,
                snapshots: None,
                slot_in: None,
                slot_out: None,
                cu_seqlens: None,
                silu: self.silu,
            };
            causal_conv::run(args, &Exec::default()).map_err(wrong)
        })?;
        let count = both.len();
        Ok((CpuStorage::F32(both), count.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
        window: &CudaStorage,
        lwindow: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::causal_conv(self, (x, lx), (w, lw), (window, lwindow))
    }
}

/// Flash attention with grouped heads, as in `csrc/attention/attention.h`.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Query i of T sees the keys up to S - T + i.
    pub causal: bool,
    /// Factor of the scores; 1/√D is customary.
    pub scale: f32,
    /// The output is multiplied by its sigmoid, `[B, T, HQ, D]`.
    pub gate: Option<Tensor>,
}

impl Attention {
    /// o `[B, T, HQ, D]` of q `[B, T, HQ, D]` in f32 and k, v `[B, S, HKV, D]` in f32, f16 or bf16. Errors name the
    /// argument.
    pub fn apply(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        q.apply_op3_no_bwd(k, v, self)
    }
}

/// Keys or values of any type that the kernels take.
fn kv<'a>(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<attention::Kv<'a>> {
    Ok(match storage {
        CpuStorage::F16(_) => attention::Kv::F16(view(name, storage, layout)?),
        CpuStorage::BF16(_) => attention::Kv::BF16(view(name, storage, layout)?),
        _ => attention::Kv::F32(view(name, storage, layout)?),
    })
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "q3n-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let q = view::<4, f32>("q", q, lq)?;
        let (k, v) = (kv("k", k, lk)?, kv("v", v, lv)?);
        let mut o = vec![0f32; q.shape().iter().product()];
        with_optional("gate", self.gate.as_ref(), |gate| {
            let args = attention::Args {
                o: ViewMut::new(&mut o, q.shape()).map_err(wrong)?,
                lse: None,
                q,
                k,
                v,
                gate: gate.map(|(s, l)| view("gate", s, l)).transpose()?,
                mask: None,
                sinks: None,
                slot: None,
                kv_len: None,
                cu_seqlens: None,
                causal: self.causal,
                scale: self.scale,
                window: None,
            };
            attention::run_split(args, &Exec::default()).map_err(wrong)
        })?;
        Ok((CpuStorage::F32(o), (&q.shape()).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        lq: &Layout,
        k: &CudaStorage,
        lk: &Layout,
        v: &CudaStorage,
        lv: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::attention(self, (q, lq), (k, lk), (v, lv))
    }
}

/// Weights of all experts, `[E, rows, columns]`.
#[derive(Debug, Clone)]
pub enum Experts {
    /// A packed f32 tensor.
    F32(Tensor),
    /// Blocks as GGUF files have them, read where they lie.
    Quantized(Arc<QTensor>),
}

impl Experts {
    fn with<R>(&self, name: &str, f: impl FnOnce(Weight<3>) -> Result<R>) -> Result<R> {
        match self {
            Experts::F32(tensor) => with_cpu(name, tensor, |storage, layout| {
                let data = storage.as_slice::<f32>().map_err(|e| Error::Msg(format!("{name}: {e}")))?;
                let dims = axes3(name, layout.dims())?;
                let Some((begin, end)) = layout.contiguous_offsets() else {
                    return Err(Error::Msg(format!("{name}: is not contiguous")));
                };
                let data = &data[begin..end];
                // SAFETY: every byte of a float may be read as a u8, and the bytes live as long as the floats.
                let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), size_of_val(data)) };
                f(Weight::new(bytes, DType::F32, dims).map_err(wrong)?)
            }),
            Experts::Quantized(tensor) => {
                let dims = axes3(name, tensor.shape().dims())?;
                f(Weight::new(&tensor.data()?, ggml_dtype(name, tensor.dtype())?, dims).map_err(wrong)?)
            }
        }
    }
}

fn ggml_dtype(name: &str, dtype: GgmlDType) -> Result<DType> {
    Ok(match dtype {
        GgmlDType::F16 => DType::F16,
        GgmlDType::BF16 => DType::BF16,
        GgmlDType::Q4_0 => DType::Q4_0,
        GgmlDType::Q8_0 => DType::Q8_0,
        GgmlDType::Q4K => DType::Q4_K,
        GgmlDType::Q5K => DType::Q5_K,
        GgmlDType::Q6K => DType::Q6_K,
        other => return Err(Error::Msg(format!("{name}: {other:?} is not taken"))),
    })
}

fn axes3(name: &str, dims: &[usize]) -> Result<[usize; 3]> {
    dims.try_into().map_err(|_| Error::Msg(format!("{name}: {} axes, expected [E, rows, columns]", dims.len())))
}

/// The sparse feed-forward: routing, gate and up with SwiGLU, down with the weighted sum, as in `csrc/moe/moe.h`.
#[derive(Debug, Clone)]
pub struct Moe {
    /// `[E, F, D]`.
    pub gate: Experts,
    /// `[E, F, D]`.
    pub up: Experts,
    /// `[E, D, F]`.
    pub down: Experts,
    /// Experts a token.
    pub top_k: usize,
    /// Divide the weights of a token's experts by their sum.
    pub normalize: bool,
}

impl Moe {
    /// y `[T, D]` of x `[T, D]` and the router's logits `[T, E]`, all f32. Errors name the argument; a NaN among the
    /// logits is one on the CPU, and makes its token's y NaN on a GPU.
    pub fn apply(&self, x: &Tensor, logits: &Tensor) -> Result<Tensor> {
        x.apply_op2_no_bwd(logits, self)
    }
}

impl CustomOp2 for Moe {
    fn name(&self) -> &'static str {
        "q3n-moe"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, logits: &CpuStorage, ll: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, logits) = (view::<2, f32>("x", x, lx)?, view("logits", logits, ll)?);
        let routing = moe::Routing::route(logits, self.top_k, self.normalize, &Exec::default()).map_err(wrong)?;
        let mut y = vec![0f32; x.shape().iter().product()];
        self.gate.with("gate", |gate| {
            self.up.with("up", |up| {
                self.down.with("down", |down| {
                    let args = moe::Args {
                        y: ViewMut::new(&mut y, x.shape()).map_err(wrong)?,
                        x: x.into(),
                        gate,
                        up,
                        down,
                        routing: &routing,
                        accumulate: false,
                        h: &mut moe::Hidden::default(),
                    };
                    moe::run(args, &moe::Execs::default()).map_err(wrong)
                })
            })
        })?;
        Ok((CpuStorage::F32(y), (&x.shape()).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        logits: &CudaStorage,
        ll: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::moe(self, (x, lx), (logits, ll))
    }
}
