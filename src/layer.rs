//! The small steps between the operators of a layer (`csrc/layer/layer.h`).

/// Rows of a table of weights.
pub mod gather {
    use crate::memory::{Addresses, Cpu, Memory};
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, ViewMut, Weight};

    operator!(
        "gather",
        q3n_gather_args,
        q3n_gather_check,
        q3n_gather_variant_count,
        q3n_gather_variant_at,
        q3n_gather_best,
        [
            "cuda",
            q3n_gather_cuda,
            q3n_gather_cuda_scratch_bytes,
            q3n_gather_cuda_host_items,
            q3n_gather_cuda_host,
            q3n_gather_cuda_host_scratch_bytes
        ]
    );

    /// Arguments of [`run`].
    pub struct Args<'a, M: Memory = Cpu> {
        /// Output, `[T][N]`.
        pub y: ViewMut<'a, 2, f32, M>,
        /// `[rows][N]`; a view of floats is one `into()` away.
        pub table: Weight<'a, 2, M>,
        /// Which rows, `[T]`.
        pub ids: M::Indices<'a>,
    }

    /// The values that [`dequantize`](crate::quant::dequantize) gives, bit for bit. Errors: shapes that do not fit
    /// together, ids outside the table, overlapping output strides.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let cost = args.y.shape().into_iter().fold(2, usize::saturating_mul);
        let (raw, at) = raw(&mut args)?;
        // SAFETY: the views lie inside their slices and their rows are as long; ids has T elements.
        unsafe { exec.execute(&raw, &at, cost) }
    }

    /// As [`run`], on a device: queues it.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
        let ids = args.ids;
        let (raw, at) = raw(&mut args)?;
        // SAFETY: as in `run`, with buffers for slices.
        unsafe { stream.queue::<Op>(raw, &at, |raw| raw.ids = ids.at()) }
    }

    /// The C args, shapes compared, and where they lie.
    fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_gather_args, Addresses<M>), Error> {
        let [t, n] = args.y.shape();
        let [rows, _] = args.table.shape();
        args.table.expect("table", [rows, n])?;
        let mut at = Addresses::new();
        let raw = ffi::q3n_gather_args {
            struct_bytes: size_of::<ffi::q3n_gather_args>() as u64,
            y: at.write(&mut args.y),
            table: at.weight(&args.table),
            ids: at.indices("ids", &Some(args.ids), t)?,
            dtype: args.table.dtype().0,
            y_t: args.y.stride(0),
            table_row: args.table.stride(0),
            T: t as i64,
            rows: rows as i64,
            N: n as i64,
        };
        Ok((raw, at))
    }
}

/// y += x.
pub mod add {
    use crate::memory::{Addresses, Cpu, Memory};
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, View, ViewMut};

    operator!(
        "add",
        q3n_add_args,
        q3n_add_check,
        q3n_add_variant_count,
        q3n_add_variant_at,
        q3n_add_best,
        [
            "cuda",
            q3n_add_cuda,
            q3n_add_cuda_scratch_bytes,
            q3n_add_cuda_host_items,
            q3n_add_cuda_host,
            q3n_add_cuda_host_scratch_bytes
        ]
    );

    /// Arguments of [`run`].
    pub struct Args<'a, M: Memory = Cpu> {
        /// What is added to, `[T][N]`.
        pub y: ViewMut<'a, 2, f32, M>,
        /// What is added, the shape of y.
        pub x: View<'a, 2, f32, M>,
    }

    /// Adds every element. Errors: shapes that differ, overlapping output strides.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let cost = args.y.shape().into_iter().fold(1, usize::saturating_mul);
        let (raw, at) = raw(&mut args)?;
        // SAFETY: both views lie inside their slices and have the same shape.
        unsafe { exec.execute(&raw, &at, cost) }
    }

    /// As [`run`], on a device: queues it.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
        let (raw, at) = raw(&mut args)?;
        // SAFETY: as in `run`, with buffers for slices.
        unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
    }

    /// The C args, shapes compared, and where they lie.
    fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_add_args, Addresses<M>), Error> {
        let [t, n] = args.y.shape();
        args.x.expect("x", [t, n])?;
        let mut at = Addresses::new();
        let raw = ffi::q3n_add_args {
            struct_bytes: size_of::<ffi::q3n_add_args>() as u64,
            y: at.write(&mut args.y),
            x: at.read(&args.x),
            y_t: args.y.stride(0),
            x_t: args.x.stride(0),
            T: t as i64,
            N: n as i64,
        };
        Ok((raw, at))
    }
}

/// The gates of the delta rule.
pub mod delta_gates {
    use crate::memory::{Addresses, Cpu, Memory};
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, View, ViewMut};

    operator!(
        "delta_gates",
        q3n_delta_gates_args,
        q3n_delta_gates_check,
        q3n_delta_gates_variant_count,
        q3n_delta_gates_variant_at,
        q3n_delta_gates_best,
        [
            "cuda",
            q3n_delta_gates_cuda,
            q3n_delta_gates_cuda_scratch_bytes,
            q3n_delta_gates_cuda_host_items,
            q3n_delta_gates_cuda_host,
            q3n_delta_gates_cuda_host_scratch_bytes
        ]
    );

    /// Arguments of [`run`].
    pub struct Args<'a, M: Memory = Cpu> {
        /// Output, logarithms of the decay, `[T][HV]`: a · softplus(α + dt_bias).
        pub g: ViewMut<'a, 2, f32, M>,
        /// Output, `[T][HV]`: sigmoid(b).
        pub beta: ViewMut<'a, 2, f32, M>,
        /// `[T][2 HV]`: for each key head r = HV / HK values b, then r values α.
        pub ba: View<'a, 2, f32, M>,
        /// `[HV]`.
        pub a: View<'a, 1, f32, M>,
        /// `[HV]`.
        pub dt_bias: View<'a, 1, f32, M>,
        /// HK, how many key heads there are; HV is a multiple.
        pub k_heads: usize,
    }

    /// Both gates of every token. Errors: shapes that do not fit together, overlapping output strides.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let cost = args.g.shape().into_iter().fold(60, usize::saturating_mul);
        let (raw, at) = raw(&mut args)?;
        // SAFETY: every view lies inside its slice and has the shape that `raw` compared.
        unsafe { exec.execute(&raw, &at, cost) }
    }

    /// As [`run`], on a device: queues it.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
        let (raw, at) = raw(&mut args)?;
        // SAFETY: as in `run`, with buffers for slices.
        unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
    }

    /// The C args, shapes compared, and where they lie.
    fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_delta_gates_args, Addresses<M>), Error> {
        let [t, hv] = args.g.shape();
        args.beta.expect("beta", [t, hv])?;
        args.ba.expect("ba", [t, hv.saturating_mul(2)])?;
        args.a.expect("a", [hv])?;
        args.dt_bias.expect("dt_bias", [hv])?;
        let mut at = Addresses::new();
        let raw = ffi::q3n_delta_gates_args {
            struct_bytes: size_of::<ffi::q3n_delta_gates_args>() as u64,
            g: at.write(&mut args.g),
            beta: at.write(&mut args.beta),
            ba: at.read(&args.ba),
            a: at.read(&args.a),
            dt_bias: at.read(&args.dt_bias),
            g_t: args.g.stride(0),
            beta_t: args.beta.stride(0),
            ba_t: args.ba.stride(0),
            T: t as i64,
            HK: i64::try_from(args.k_heads).unwrap_or(i64::MAX),
            HV: hv as i64,
        };
        Ok((raw, at))
    }
}

/// Keys or values into a cache.
pub mod kv_store {
    use crate::attention::Q8_0;
    use crate::memory::{Addresses, Cpu, Memory};
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, View, ViewMut};
    use half::{bf16, f16};

    operator!(
        "kv_store",
        q3n_kv_store_args,
        q3n_kv_store_check,
        q3n_kv_store_variant_count,
        q3n_kv_store_variant_at,
        q3n_kv_store_best,
        [
            "cuda",
            q3n_kv_store_cuda,
            q3n_kv_store_cuda_scratch_bytes,
            q3n_kv_store_cuda_host_items,
            q3n_kv_store_cuda_host,
            q3n_kv_store_cuda_host_scratch_bytes
        ]
    );

    /// Keys or values of all sequences, `[slots][S][N]`; Q8_0 in blocks, `[slots][S][N/32]`.
    #[derive(Debug)]
    pub enum Cache<'a, M: Memory = Cpu> {
        /// 32-bit floats.
        F32(ViewMut<'a, 3, f32, M>),
        /// IEEE half.
        F16(ViewMut<'a, 3, f16, M>),
        /// bfloat16.
        BF16(ViewMut<'a, 3, bf16, M>),
        /// 32 int8 with a scale.
        Q8_0(ViewMut<'a, 3, Q8_0, M>),
    }

    /// What the C side takes of a cache; sizes and strides in elements.
    struct RawCache {
        dtype: ffi::q3n_dtype,
        data: *mut std::ffi::c_void,
        shape: [usize; 3],
        strides: [i64; 2],
    }

    impl<M: Memory> Cache<'_, M> {
        fn raw(&mut self, at: &mut Addresses<M>) -> RawCache {
            fn of<T, M: Memory>(
                dtype: ffi::q3n_dtype,
                view: &mut ViewMut<3, T, M>,
                block: usize,
                at: &mut Addresses<M>,
            ) -> RawCache {
                let [slots, s, n] = view.shape();
                RawCache {
                    dtype,
                    data: at.write(view).cast(),
                    shape: [slots, s, n.saturating_mul(block)],
                    strides: view.outer().map(|stride: i64| stride.saturating_mul(block as i64)),
                }
            }
            match self {
                Cache::F32(view) => of(ffi::Q3N_F32, view, 1, at),
                Cache::F16(view) => of(ffi::Q3N_F16, view, 1, at),
                Cache::BF16(view) => of(ffi::Q3N_BF16, view, 1, at),
                Cache::Q8_0(view) => of(ffi::Q3N_Q8_0, view, 32, at),
            }
        }
    }

    /// Arguments of [`run`].
    pub struct Args<'a, M: Memory = Cpu> {
        /// What is written to; other rows stay as they are.
        pub cache: Cache<'a, M>,
        /// Rows, `[T][N]`.
        pub x: View<'a, 2, f32, M>,
        /// Cache entry of each sequence, `[B]`, all different.
        pub slot: M::Indices<'a>,
        /// Position of each token, `[T]`, < S, increasing within a sequence.
        pub pos: M::Indices<'a>,
        /// `[B+1]`, from 0 to T: sequence b is the tokens `cu_seqlens[b]..cu_seqlens[b+1]`.
        pub cu_seqlens: M::Indices<'a>,
    }

    /// Stores every row, with the bits that [`quantize`](crate::quant::quantize) gives. Errors: shapes that do not fit
    /// together, slots outside the pool or used twice, positions outside a slot or not increasing, sequences that do
    /// not cover T, overlapping strides of the cache.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let cost = args.x.shape().into_iter().fold(8, usize::saturating_mul);
        let (raw, at) = raw(&mut args)?;
        // SAFETY: the views lie inside their slices, their rows are as long, and the index arrays have the lengths that
        // `raw` compared; the C check validates what they hold.
        unsafe { exec.execute(&raw, &at, cost) }
    }

    /// As [`run`], on a device: queues it.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
        let (slot, pos, cu_seqlens) = (args.slot, args.pos, args.cu_seqlens);
        let (raw, at) = raw(&mut args)?;
        // SAFETY: as in `run`, with buffers for slices.
        unsafe {
            stream.queue::<Op>(raw, &at, |raw| {
                (raw.slot, raw.pos, raw.cu_seqlens) = (slot.at(), pos.at(), cu_seqlens.at());
            })
        }
    }

    /// The C args, shapes compared, and where they lie.
    fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_kv_store_args, Addresses<M>), Error> {
        let [t, n] = args.x.shape();
        let batch = crate::operator::sequences(1, Some(M::indices(&args.cu_seqlens)))?;
        let mut at = Addresses::new();
        let cache = args.cache.raw(&mut at);
        let [slots, s, _] = cache.shape;
        crate::view::expect("cache", cache.shape, [slots, s, n])?;
        let [cache_slot, cache_s] = cache.strides;
        let raw = ffi::q3n_kv_store_args {
            struct_bytes: size_of::<ffi::q3n_kv_store_args>() as u64,
            cache: cache.data,
            x: at.read(&args.x),
            slot: at.indices("slot", &Some(args.slot), batch)?,
            pos: at.indices("pos", &Some(args.pos), t)?,
            cu_seqlens: at.indices("cu_seqlens", &Some(args.cu_seqlens), batch + 1)?,
            dtype: cache.dtype,
            cache_slot,
            cache_s,
            x_t: args.x.stride(0),
            slots: slots as i64,
            S: s as i64,
            B: batch as i64,
            T: t as i64,
            N: n as i64,
        };
        Ok((raw, at))
    }
}

/// How much of the shared expert a token takes.
pub mod row_gate {
    use crate::memory::{Addresses, Cpu, Memory};
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, View, ViewMut};

    operator!(
        "row_gate",
        q3n_row_gate_args,
        q3n_row_gate_check,
        q3n_row_gate_variant_count,
        q3n_row_gate_variant_at,
        q3n_row_gate_best,
        [
            "cuda",
            q3n_row_gate_cuda,
            q3n_row_gate_cuda_scratch_bytes,
            q3n_row_gate_cuda_host_items,
            q3n_row_gate_cuda_host,
            q3n_row_gate_cuda_host_scratch_bytes
        ]
    );

    /// Arguments of [`run`].
    pub struct Args<'a, M: Memory = Cpu> {
        /// Output, `[T]`.
        pub y: ViewMut<'a, 1, f32, M>,
        /// Rows, `[T][D]`.
        pub x: View<'a, 2, f32, M>,
        /// `[D]`.
        pub w: View<'a, 1, f32, M>,
    }

    /// sigmoid(x · w) of every row. Errors: shapes that do not fit together.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let cost = args.x.shape().into_iter().fold(4, usize::saturating_mul);
        let (raw, at) = raw(&mut args)?;
        // SAFETY: every view lies inside its slice and has the shape that `raw` compared.
        unsafe { exec.execute(&raw, &at, cost) }
    }

    /// As [`run`], on a device: queues it.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
        let (raw, at) = raw(&mut args)?;
        // SAFETY: as in `run`, with buffers for slices.
        unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
    }

    /// The C args, shapes compared, and where they lie.
    fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_row_gate_args, Addresses<M>), Error> {
        let [t, d] = args.x.shape();
        args.y.expect("y", [t])?;
        args.w.expect("w", [d])?;
        let mut at = Addresses::new();
        let raw = ffi::q3n_row_gate_args {
            struct_bytes: size_of::<ffi::q3n_row_gate_args>() as u64,
            y: at.write(&mut args.y),
            x: at.read(&args.x),
            w: at.read(&args.w),
            x_t: args.x.stride(0),
            T: t as i64,
            D: d as i64,
        };
        Ok((raw, at))
    }
}
