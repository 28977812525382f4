//! The operators on CUDA tensors: the args of the C launchers over candle's memory, queued on the stream of its device.
//! Nothing is waited for. Launchers and cudarc both use the device's primary context, which is bound to the thread first.

use crate::{ggml_dtype, Attention, CausalConv, Experts, GatedDelta, Moe};
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage, CudaStorageSlice, WrapErr};
use candle_core::{Device, Error, Layout, Result, Shape, Storage, Tensor};
use qwen3next_kernels::{attention, causal_conv, ffi, gated_delta, moe, Operator};
use std::ffi::CStr;
use std::ops::Deref;

/// An operand of a `CustomOp`.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// An array as the C args take it: strides in elements.
struct Array<const R: usize, T> {
    at: *const T,
    shape: [usize; R],
    stride: [i64; R],
}

impl<const R: usize, T> Array<R, T> {
    fn expect(&self, name: &str, shape: [usize; R]) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(Error::Msg(format!("{name}: shape {:?}, expected {shape:?}", self.shape)))
    }

    /// Its address, or NULL.
    fn or_null(array: &Option<Self>) -> *const T {
        array.as_ref().map_or(std::ptr::null(), |a| a.at)
    }

    /// A stride, or 0.
    fn or_zero(array: &Option<Self>, axis: usize) -> i64 {
        array.as_ref().map_or(0, |a| a.stride[axis])
    }
}

/// Experts' weights, `[E, rows, columns]`, packed.
struct Weights {
    at: *const std::ffi::c_void,
    dtype: ffi::q3n_dtype,
    shape: [usize; 3],
}

impl Weights {
    fn strides(&self) -> [i64; 2] {
        let [_, rows, columns] = self.shape.map(|n| n as i64);
        [rows * columns, columns]
    }

    fn expect(&self, name: &str, shape: [usize; 3]) -> Result<()> {
        Array { at: self.at, shape: self.shape, stride: [0; 3] }.expect(name, shape)
    }
}

/// One call: where it is queued, and what cudarc is told once it is.
struct Call<'a> {
    device: &'a CudaDevice,
    stream: &'a CudaStream,
    used: Vec<SyncOnDrop<'a>>,
}

impl<'a> Call<'a> {
    fn new(device: &'a CudaDevice, stream: &'a CudaStream) -> Result<Self> {
        stream.context().bind_to_thread().w()?;
        Ok(Call { device, stream, used: Vec::new() })
    }

    fn same_device(&self, name: &str, device: &CudaDevice) -> Result<()> {
        if device.same_device(self.device) {
            return Ok(());
        }
        Err(Error::Msg(format!("{name}: lies on another GPU than the first operand")))
    }

    fn array<const R: usize, T: CudaDType + 'static>(&mut self, name: &str, of: Operand<'a>) -> Result<Array<R, T>> {
        let slice = of.0.as_cuda_slice::<T>().map_err(|e| Error::Msg(format!("{name}: {e}")))?;
        self.slice(name, slice, of)
    }

    fn slice<const R: usize, T>(&mut self, name: &str, slice: &'a CudaSlice<T>, of: Operand) -> Result<Array<R, T>> {
        let (storage, layout) = of;
        self.same_device(name, &storage.device)?;
        let axes = |values: &[usize]| {
            let count = values.len();
            <[usize; R]>::try_from(values).map_err(|_| Error::Msg(format!("{name}: {count} axes, expected {R}")))
        };
        let (shape, stride) = (axes(layout.dims())?, axes(layout.stride())?);
        if shape.last().is_some_and(|&n| n > 1) && stride.last() != Some(&1) {
            return Err(Error::Msg(format!("{name}: strides {stride:?}, expected 1 on the last axis")));
        }
        let (at, used) = slice.device_ptr(self.stream);
        self.used.push(used);
        let at = (at as *const T).wrapping_add(layout.start_offset());
        Ok(Array { at, shape, stride: stride.map(|s| s as i64) })
    }

    /// A tensor that came beside the operands.
    fn beside<const R: usize, T: CudaDType + 'static>(
        &mut self,
        name: &str,
        of: &'a (impl Deref<Target = Storage>, &'a Layout),
    ) -> Result<Array<R, T>> {
        let Storage::Cuda(storage) = &*of.0 else { return Err(not_on_gpu(name)) };
        self.array(name, (storage, of.1))
    }

    /// As [`Call::beside`] where there may be no tensor.
    fn optional<const R: usize, T: CudaDType + 'static>(
        &mut self,
        name: &str,
        of: &'a Option<(impl Deref<Target = Storage>, &'a Layout)>,
    ) -> Result<Option<Array<R, T>>> {
        of.as_ref().map(|of| self.beside(name, of)).transpose()
    }

    fn weights(
        &mut self,
        name: &str,
        experts: &Experts,
        floats: &'a Option<(impl Deref<Target = Storage>, &'a Layout)>,
    ) -> Result<Weights> {
        match experts {
            Experts::F32(tensor) => {
                if !tensor.is_contiguous() {
                    return Err(Error::Msg(format!("{name}: is not contiguous")));
                }
                let Some(Array { at, shape, .. }) = self.optional::<3, f32>(name, floats)? else {
                    return Err(not_on_gpu(name));
                };
                Ok(Weights { at: at.cast(), dtype: ffi::Q3N_F32, shape })
            }
            Experts::Quantized(tensor) => {
                let Device::Cuda(device) = tensor.device() else { return Err(not_on_gpu(name)) };
                self.same_device(name, &device)?;
                let dtype = ggml_dtype(name, tensor.dtype())?.ggml();
                Ok(Weights {
                    at: tensor.device_ptr()?.cast(),
                    dtype,
                    shape: crate::axes3(name, tensor.shape().dims())?,
                })
            }
        }
    }

    /// Fresh memory; nobody reads it before it is written.
    fn alloc<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        if len > isize::MAX as usize / size_of::<T>() {
            return Err(Error::Msg(format!("{len} elements are more than memory can hold")));
        }
        // SAFETY: the kernels that are queued next write what others read.
        unsafe { self.device.alloc(len.max(1)) }
    }

    fn written<T>(&mut self, slice: &'a mut CudaSlice<T>) -> *mut T {
        let (at, used) = slice.device_ptr_mut(self.stream);
        self.used.push(used);
        at as *mut T
    }

    /// Checks `raw` and queues the operator's first kernel.
    ///
    /// # Safety
    /// Its pointers are this device's, and valid for what the operator's header says.
    unsafe fn launch<O: Operator>(&self, raw: &O::Raw) -> Result<()> {
        refused::<O>(O::check(raw))?;
        let kernel = O::KERNELS.first().and_then(|k| k.gpu);
        let (launch, scratch_bytes) = kernel.ok_or_else(|| Error::Msg(format!("{}: no CUDA kernel", O::NAME)))?;
        // SAFETY: checked above.
        let bytes = usize::try_from(unsafe { scratch_bytes(raw) }).unwrap_or(0);
        let mut scratch = self.alloc::<u8>(bytes)?;
        let (at, _used) = scratch.device_ptr_mut(self.stream);
        // SAFETY: as above, scratch of the size it asked for, and a stream of the context that is bound.
        refused::<O>(unsafe { launch(raw, at as *mut _, self.stream.cu_stream().cast()) })
    }
}

fn not_on_gpu(name: &str) -> Error {
    Error::Msg(format!("{name}: does not lie on the GPU"))
}

fn refused<O: Operator>(status: i32) -> Result<()> {
    if status == ffi::Q3N_OK as i32 {
        return Ok(());
    }
    // SAFETY: both are NUL-terminated; the report is this thread's and changes with its next failure alone.
    let text = unsafe {
        CStr::from_ptr(match status as u32 & 0xff {
            ffi::Q3N_DEVICE => ffi::q3n_cuda_report(),
            _ => ffi::q3n_status_string(status),
        })
    };
    Err(Error::Msg(format!("{}: {}", O::NAME, text.to_string_lossy())))
}

/// The product, refused where it overflows.
fn count(sizes: &[usize]) -> Result<usize> {
    let product = sizes.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    product.ok_or_else(|| Error::Msg(format!("{sizes:?} elements are more than memory can hold")))
}

pub(crate) fn gated_delta(op: &GatedDelta, q: Operand, k: Operand, v: Operand) -> Result<(CudaStorage, Shape)> {
    let (device, stream) = (&q.0.device, q.0.device.cuda_stream());
    let (g, state) = (op.g.as_ref().map(Tensor::storage_and_layout), op.state.as_ref().map(Tensor::storage_and_layout));
    let beta = op.beta.storage_and_layout();
    // Declared before the call, which borrows what it writes.
    let mut both;
    let mut call = Call::new(device, &stream)?;
    let (q, k, v) = (call.array::<4, f32>("q", q)?, call.array::<4, f32>("k", k)?, call.array::<4, f32>("v", v)?);
    let ([b, t, hv, vd], [.., hk, kd]) = (v.shape, k.shape);
    q.expect("q", [b, t, hk, kd])?;
    k.expect("k", [b, t, hk, kd])?;
    let beta = call.beside::<3, f32>("beta", &beta)?;
    beta.expect("beta", [b, t, hv])?;
    let state = call.optional::<4, f32>("state", &state)?;
    state.as_ref().map_or(Ok(()), |s| s.expect("state", [b, hv, vd, kd]))?;
    // SAFETY: null pointers, zeros and the first values of enums are a valid struct.
    let mut raw: ffi::q3n_gated_delta_args = unsafe { std::mem::zeroed() };
    if g.as_ref().is_some_and(|(_, layout)| layout.dims().len() == 4) {
        let g = call.optional::<4, f32>("g", &g)?;
        g.as_ref().map_or(Ok(()), |g| g.expect("g", [b, t, hv, kd]))?;
        (raw.g, raw.gate) = (Array::or_null(&g), ffi::Q3N_GATE_CHANNEL);
        (raw.g_b, raw.g_t, raw.g_h) = (Array::or_zero(&g, 0), Array::or_zero(&g, 1), Array::or_zero(&g, 2));
    } else if g.is_some() {
        let g = call.optional::<3, f32>("g", &g)?;
        g.as_ref().map_or(Ok(()), |g| g.expect("g", [b, t, hv]))?;
        (raw.g, raw.gate) = (Array::or_null(&g), ffi::Q3N_GATE_SCALAR);
        (raw.g_b, raw.g_t, raw.g_h) = (Array::or_zero(&g, 0), Array::or_zero(&g, 1), Array::or_zero(&g, 2));
    }
    let (outputs, states) = (count(&[b, t, hv, vd])?, count(&[b, hv, vd, kd])?);
    let packed = [count(&[hv, vd, kd])?, count(&[vd, kd])?, kd].map(|n| n as i64);
    // The states that are read have the strides of those that are written.
    if state.as_ref().is_some_and(|s| states > 0 && s.stride[..3] != packed) {
        return Err(Error::Msg("state: is not contiguous".into()));
    }
    both = call.alloc::<f32>(outputs.saturating_add(states))?;
    let o = call.written(&mut both);
    raw = ffi::q3n_gated_delta_args {
        struct_bytes: size_of_val(&raw) as u64,
        o: o.cast(),
        state_out: o.wrapping_add(outputs),
        q: q.at.cast(),
        k: k.at.cast(),
        v: v.at.cast(),
        dtype: ffi::Q3N_F32,
        beta: beta.at,
        state_in: Array::or_null(&state),
        head_map: match op.head_map {
            gated_delta::HeadMap::Grouped => ffi::Q3N_HEADS_GROUPED,
            gated_delta::HeadMap::Tiled => ffi::Q3N_HEADS_TILED,
        },
        qk_l2norm: op.qk_l2norm.is_some().into(),
        qk_l2norm_eps: op.qk_l2norm.unwrap_or(0.0),
        scale: op.scale,
        o_b: count(&[t, hv, vd])? as i64,
        o_t: count(&[hv, vd])? as i64,
        o_h: vd as i64,
        q_b: q.stride[0],
        q_t: q.stride[1],
        q_h: q.stride[2],
        k_b: k.stride[0],
        k_t: k.stride[1],
        k_h: k.stride[2],
        v_b: v.stride[0],
        v_t: v.stride[1],
        v_h: v.stride[2],
        beta_b: beta.stride[0],
        beta_t: beta.stride[1],
        beta_h: beta.stride[2],
        state_slot: packed[0],
        state_h: packed[1],
        state_v: packed[2],
        slots: b as i64,
        B: b as i64,
        T: t as i64,
        HK: hk as i64,
        HV: hv as i64,
        K: kd as i64,
        V: vd as i64,
        ..raw
    };
    // SAFETY: every array has the shape just compared, within its tensor; the output was made for its sizes.
    unsafe { call.launch::<gated_delta::Op>(&raw)? };
    drop(call);
    Ok((CudaStorage::wrap_cuda_slice(both, device.clone()), (outputs + states).into()))
}

pub(crate) fn causal_conv(op: &CausalConv, x: Operand, w: Operand, window: Operand) -> Result<(CudaStorage, Shape)> {
    let (device, stream) = (&x.0.device, x.0.device.cuda_stream());
    let bias = op.bias.as_ref().map(Tensor::storage_and_layout);
    // Declared before the call, which borrows what it writes.
    let mut both;
    let mut call = Call::new(device, &stream)?;
    let (x, w) = (call.array::<3, f32>("x", x)?, call.array::<2, f32>("w", w)?);
    let ([b, t, c], [_, width]) = (x.shape, w.shape);
    w.expect("w", [c, width])?;
    let (window, keep) = (call.array::<3, f32>("window", window)?, width.saturating_sub(1));
    window.expect("state_in", [b, c, keep])?;
    let bias = call.optional::<1, f32>("bias", &bias)?;
    bias.as_ref().map_or(Ok(()), |bias| bias.expect("bias", [c]))?;
    let (outputs, states) = (count(&[b, t, c])?, count(&[b, c, keep])?);
    let packed = [count(&[c, keep])?, keep].map(|n| n as i64);
    if states > 0 && window.stride[..2] != packed {
        return Err(Error::Msg("window: is not contiguous".into()));
    }
    both = call.alloc::<f32>(outputs.saturating_add(states))?;
    let y = call.written(&mut both);
    let raw = ffi::q3n_causal_conv_args {
        struct_bytes: size_of::<ffi::q3n_causal_conv_args>() as u64,
        y,
        state_out: y.wrapping_add(outputs),
        x: x.at,
        w: w.at,
        bias: Array::or_null(&bias),
        state_in: window.at,
        silu: op.silu.into(),
        y_b: count(&[t, c])? as i64,
        y_t: c as i64,
        x_b: x.stride[0],
        x_t: x.stride[1],
        w_c: w.stride[0],
        state_slot: packed[0],
        state_c: packed[1],
        slots: b as i64,
        B: b as i64,
        T: t as i64,
        C: c as i64,
        width: width as i64,
        // SAFETY: null pointers and zeros are a valid struct.
        ..unsafe { std::mem::zeroed() }
    };
    // SAFETY: every array has the shape just compared, within its tensor; the output was made for its sizes.
    unsafe { call.launch::<causal_conv::Op>(&raw)? };
    drop(call);
    Ok((CudaStorage::wrap_cuda_slice(both, device.clone()), (outputs + states).into()))
}

/// Keys or values of any type that the kernels take.
fn kv<'a>(call: &mut Call<'a>, name: &str, of: Operand<'a>) -> Result<(Array<4, std::ffi::c_void>, ffi::q3n_dtype)> {
    fn erased<T>(a: Array<4, T>) -> Array<4, std::ffi::c_void> {
        Array { at: a.at.cast(), shape: a.shape, stride: a.stride }
    }
    Ok(match &of.0.slice {
        CudaStorageSlice::F16(slice) => (erased(call.slice(name, slice, of)?), ffi::Q3N_F16),
        CudaStorageSlice::BF16(slice) => (erased(call.slice(name, slice, of)?), ffi::Q3N_BF16),
        _ => (erased(call.array::<4, f32>(name, of)?), ffi::Q3N_F32),
    })
}

pub(crate) fn attention(op: &Attention, q: Operand, k: Operand, v: Operand) -> Result<(CudaStorage, Shape)> {
    let (device, stream) = (&q.0.device, q.0.device.cuda_stream());
    let gate = op.gate.as_ref().map(Tensor::storage_and_layout);
    // Declared before the call, which borrows what it writes.
    let mut o;
    let mut call = Call::new(device, &stream)?;
    let q = call.array::<4, f32>("q", q)?;
    let ((k, kv_dtype), (v, v_dtype)) = (kv(&mut call, "k", k)?, kv(&mut call, "v", v)?);
    let ([b, t, hq, d], [_, s, hkv, _]) = (q.shape, k.shape);
    k.expect("k", [b, s, hkv, d])?;
    v.expect("v", k.shape)?;
    if kv_dtype != v_dtype {
        return Err(Error::Msg("v: is not of the type of k".into()));
    }
    let gate = call.optional::<4, f32>("gate", &gate)?;
    gate.as_ref().map_or(Ok(()), |gate| gate.expect("gate", q.shape))?;
    o = call.alloc::<f32>(count(&q.shape)?)?;
    let raw = ffi::q3n_attention_args {
        struct_bytes: size_of::<ffi::q3n_attention_args>() as u64,
        o: call.written(&mut o),
        q: q.at,
        k: k.at,
        v: v.at,
        gate: Array::or_null(&gate),
        kv_dtype,
        causal: op.causal.into(),
        scale: op.scale,
        o_b: count(&[t, hq, d])? as i64,
        o_t: count(&[hq, d])? as i64,
        o_h: d as i64,
        q_b: q.stride[0],
        q_t: q.stride[1],
        q_h: q.stride[2],
        k_slot: k.stride[0],
        k_s: k.stride[1],
        k_h: k.stride[2],
        v_slot: v.stride[0],
        v_s: v.stride[1],
        v_h: v.stride[2],
        gate_b: Array::or_zero(&gate, 0),
        gate_t: Array::or_zero(&gate, 1),
        gate_h: Array::or_zero(&gate, 2),
        kv_end: s as i64,
        slots: b as i64,
        B: b as i64,
        T: t as i64,
        S: s as i64,
        HQ: hq as i64,
        HKV: hkv as i64,
        D: d as i64,
        // SAFETY: null pointers, zeros and the first values of enums are a valid struct.
        ..unsafe { std::mem::zeroed() }
    };
    // SAFETY: every array has the shape just compared, within its tensor; the output was made for its sizes.
    unsafe { call.launch::<attention::Op>(&raw)? };
    drop(call);
    Ok((CudaStorage::wrap_cuda_slice(o, device.clone()), (&q.shape).into()))
}

pub(crate) fn moe(op: &Moe, x: Operand, logits: Operand) -> Result<(CudaStorage, Shape)> {
    let (device, stream) = (&x.0.device, x.0.device.cuda_stream());
    let floats = [&op.gate, &op.up, &op.down].map(|experts| match experts {
        Experts::F32(tensor) => Some(tensor.storage_and_layout()),
        Experts::Quantized(_) => None,
    });
    // Declared before the call, which borrows what it writes.
    let (mut ids, mut weights, mut order, mut offsets, mut h, mut y);
    let mut call = Call::new(device, &stream)?;
    let (x, logits) = (call.array::<2, f32>("x", x)?, call.array::<2, f32>("logits", logits)?);
    let ([t, d], [_, e], top_k) = (x.shape, logits.shape, op.top_k);
    logits.expect("logits", [t, e])?;
    if top_k == 0 || top_k > e {
        return Err(Error::Msg(format!("top_k: {top_k} of {e} experts")));
    }
    let gate = call.weights("gate", &op.gate, &floats[0])?;
    let up = call.weights("up", &op.up, &floats[1])?;
    let down = call.weights("down", &op.down, &floats[2])?;
    let f = gate.shape[1];
    gate.expect("gate", [e, f, d])?;
    up.expect("up", [e, f, d])?;
    down.expect("down", [e, d, f])?;

    let pairs = count(&[t, top_k])?;
    (ids, weights) = (call.alloc::<i32>(pairs)?, call.alloc::<f32>(pairs)?);
    (order, offsets) = (call.alloc::<i64>(pairs)?, call.alloc::<i64>(e + 1)?);
    (h, y) = (call.alloc::<f32>(count(&[pairs, f])?)?, call.alloc::<f32>(count(&[t, d])?)?);
    let size = |n: usize| n as i64;
    let route = ffi::q3n_moe_route_args {
        struct_bytes: size_of::<ffi::q3n_moe_route_args>() as u64,
        ids: call.written(&mut ids),
        weights: call.written(&mut weights),
        bad_token: std::ptr::null_mut(),
        logits: logits.at,
        normalize: op.normalize.into(),
        logits_t: logits.stride[0],
        T: size(t),
        E: size(e),
        top_k: size(top_k),
    };
    let group = ffi::q3n_moe_group_args {
        struct_bytes: size_of::<ffi::q3n_moe_group_args>() as u64,
        order: call.written(&mut order),
        offsets: call.written(&mut offsets),
        ids: route.ids,
        T: size(t),
        E: size(e),
        top_k: size(top_k),
    };
    let hidden = ffi::q3n_moe_up_args {
        struct_bytes: size_of::<ffi::q3n_moe_up_args>() as u64,
        h: call.written(&mut h),
        x: x.at.cast(),
        gate: gate.at,
        up: up.at,
        order: group.order,
        offsets: group.offsets,
        gate_dtype: gate.dtype,
        up_dtype: up.dtype,
        x_dtype: ffi::Q3N_F32,
        x_t: x.stride[0],
        gate_e: gate.strides()[0],
        gate_f: gate.strides()[1],
        up_e: up.strides()[0],
        up_f: up.strides()[1],
        T: size(t),
        E: size(e),
        top_k: size(top_k),
        D: size(d),
        F: size(f),
    };
    let combined = ffi::q3n_moe_down_args {
        struct_bytes: size_of::<ffi::q3n_moe_down_args>() as u64,
        y: call.written(&mut y),
        h: hidden.h.cast(),
        weights: route.weights,
        down: down.at,
        order: group.order,
        offsets: group.offsets,
        dtype: down.dtype,
        h_dtype: ffi::Q3N_F32,
        accumulate: 0,
        y_t: size(d),
        down_e: down.strides()[0],
        down_d: down.strides()[1],
        T: size(t),
        E: size(e),
        top_k: size(top_k),
        D: size(d),
        F: size(f),
    };
    // SAFETY: every array has the shape just compared, within its tensor; those in between were made for their sizes, and
    // each is written by the call before the one that reads it.
    unsafe {
        call.launch::<moe::route::Op>(&route)?;
        call.launch::<moe::group::Op>(&group)?;
        call.launch::<moe::up::Op>(&hidden)?;
        call.launch::<moe::down::Op>(&combined)?;
    }
    drop(call);
    Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), (t, d).into()))
}
