//! The weights of a model in one layout, whatever file they came from.
//!
//! Projections stay in the file's type and memory map; a row is an output. The few tensors that a container stores
//! in another order are gathered row by row when they are loaded. Vectors become f32.

use crate::error::Error;
use half::{bf16, f16};
use memmap2::Mmap;
use qwen3next_kernels::{repack, DType, Exec, Weight};
use rayon::prelude::*;
use std::fmt;
use std::sync::Arc;

/// Bytes that outlive the file object they came from.
#[derive(Clone)]
pub(crate) enum Store {
    /// A file.
    Mapped(Arc<Mmap>),
    /// Gathered or converted at load.
    Owned(Arc<Memory>),
    /// Part of the program.
    Embedded(&'static [u8]),
}

/// Bytes of our own, 64-byte aligned and zero at first. Large ones ask for huge pages: weights are read in long runs, and
/// a page of 4 KB ends every run of the hardware's prefetcher.
pub(crate) struct Memory {
    bytes: Bytes,
    start: usize,
    len: usize,
}

enum Bytes {
    Heap(Vec<u8>),
    Pages(memmap2::MmapMut),
}

impl Memory {
    /// Bytes from which huge pages pay.
    const LARGE: usize = 4 << 20;

    /// `len` zeros; `None` where there is no memory.
    pub(crate) fn zeros(len: usize) -> Option<Memory> {
        if len >= Self::LARGE {
            let pages = memmap2::MmapMut::map_anon(len).ok()?;
            #[cfg(target_os = "linux")]
            // Without huge pages it is only slower.
            let _ = pages.advise(memmap2::Advice::HugePage);
            return Some(Memory { bytes: Bytes::Pages(pages), start: 0, len });
        }
        let heap = vec![0u8; len + 63];
        let start = heap.as_ptr().align_offset(64).min(63);
        Some(Memory { bytes: Bytes::Heap(heap), start, len })
    }

    /// These bytes, as they are.
    pub(crate) fn of(heap: Vec<u8>) -> Memory {
        Memory { start: 0, len: heap.len(), bytes: Bytes::Heap(heap) }
    }

    /// All of them.
    pub(crate) fn bytes(&self) -> &[u8] {
        let all: &[u8] = match &self.bytes {
            Bytes::Heap(heap) => heap,
            Bytes::Pages(pages) => pages,
        };
        all.get(self.start..self.start + self.len).unwrap_or(&[])
    }

    /// All of them, to be filled.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let all: &mut [u8] = match &mut self.bytes {
            Bytes::Heap(heap) => heap,
            Bytes::Pages(pages) => pages,
        };
        all.get_mut(self.start..self.start + self.len).unwrap_or(&mut [])
    }
}

impl Store {
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Store::Mapped(map) => map,
            Store::Owned(memory) => memory.bytes(),
            Store::Embedded(bytes) => bytes,
        }
    }
}

/// One weight, `[experts][rows][cols]` with packed rows; a matrix has one expert, a vector one row. Cheap to clone.
#[derive(Clone)]
pub struct Tensor {
    store: Store,
    /// First byte in the store. `start`, `len` lie inside it and `start` is aligned for the type.
    start: usize,
    /// Bytes from the first to one past the last element.
    len: usize,
    dtype: DType,
    experts: usize,
    rows: usize,
    cols: usize,
    /// Elements from one expert to the next.
    expert_stride: usize,
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let place = match self.store {
            Store::Mapped(_) => "mapped",
            Store::Owned(_) => "owned",
            Store::Embedded(_) => "embedded",
        };
        write!(f, "Tensor({} {}x{}x{} {place})", self.dtype, self.experts, self.rows, self.cols)
    }
}

/// Bytes that the address of a type's first element must divide by.
pub(crate) fn alignment(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 4,
        DType::F16 | DType::BF16 => 2,
        // Kernels read blocks byte by byte.
        _ => 1,
    }
}

impl Tensor {
    /// A tensor in `store`; `None` where the shape does not fit the type or the bytes. Misaligned data is copied.
    pub(crate) fn new(store: Store, start: usize, dtype: DType, shape: [usize; 3], stride: usize) -> Option<Tensor> {
        let [experts, rows, cols] = shape;
        let matrix = rows.checked_mul(cols)?;
        if cols % dtype.block() != 0 || stride % dtype.block() != 0 || (experts > 1 && stride < matrix) {
            return None;
        }
        let elements = match experts {
            0 => 0,
            n => (n - 1).checked_mul(stride)?.checked_add(matrix)?,
        };
        let len = dtype.bytes(elements)?;
        let bytes = store.bytes().get(start..)?.get(..len)?;
        let tensor = if bytes.as_ptr().align_offset(alignment(dtype)) == 0 {
            Tensor { store, start, len, dtype, experts, rows, cols, expert_stride: stride }
        } else {
            let mut memory = Memory::zeros(len)?;
            memory.bytes_mut().copy_from_slice(bytes);
            let store = Store::Owned(Arc::new(memory));
            Tensor { store, start: 0, len, dtype, experts, rows, cols, expert_stride: stride }
        };
        Some(tensor)
    }

    /// A packed tensor of its own memory, filled by `fill`; `None` where the shape does not fit the type.
    pub(crate) fn owned(dtype: DType, shape: [usize; 3], fill: impl FnOnce(&mut [u8]) -> Option<()>) -> Option<Tensor> {
        let [experts, rows, cols] = shape;
        let matrix = rows.checked_mul(cols)?;
        let len = dtype.bytes(matrix.checked_mul(experts)?)?;
        if cols % dtype.block() != 0 {
            return None;
        }
        let mut memory = Memory::zeros(len)?;
        fill(memory.bytes_mut())?;
        let store = Store::Owned(Arc::new(memory));
        Some(Tensor { store, start: 0, len, dtype, experts, rows, cols, expert_stride: matrix })
    }

    /// A packed f32 tensor of these values.
    pub fn from_f32(values: &[f32], shape: [usize; 3]) -> Result<Tensor, Error> {
        let expected = shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
        if expected != Some(values.len()) {
            return Err(Error::argument("values", format!("{} values for shape {shape:?}", values.len())));
        }
        let bytes = values.iter().flat_map(|v| v.to_le_bytes());
        let fill = |out: &mut [u8]| {
            out.iter_mut().zip(bytes).for_each(|(o, b)| *o = b);
            Some(())
        };
        Tensor::owned(DType::F32, shape, fill).ok_or_else(|| Error::argument("shape", "is too large"))
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Matrices; 1 for an ordinary weight.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Rows (outputs) of a matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (inputs) of a matrix: the contiguous axis.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `[experts, rows, cols]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.experts, self.rows, self.cols]
    }

    /// Elements from a row to the next, a multiple of the type's block.
    pub fn row_stride(&self) -> usize {
        self.cols
    }

    /// Elements from an expert's matrix to the next one, a multiple of the type's block; larger than rows · cols where
    /// gate and up lie in one merged tensor.
    pub fn expert_stride(&self) -> usize {
        self.expert_stride
    }

    /// All bytes from the first to one past the last element; aligned for the type.
    pub fn bytes(&self) -> &[u8] {
        self.store.bytes().get(self.start..self.start + self.len).unwrap_or(&[])
    }

    /// Bytes of the elements themselves, without the gaps between experts.
    pub fn packed_bytes(&self) -> usize {
        self.experts * self.rows * self.row_bytes()
    }

    /// The same weights with every 16 rows interleaved, in memory of their own; `None` where the type or the number of
    /// rows does not allow it. Errors of the operator cannot happen for a tensor that exists.
    pub fn interleaved(&self) -> Option<Tensor> {
        let dtype =
            self.dtype.interleaved().filter(|_| !self.dtype.is_interleaved() && self.rows % repack::GROUP == 0)?;
        let shape = [self.experts * self.rows, self.cols];
        let matrix = self.rows * self.cols;
        Tensor::owned(dtype, self.shape(), |y| {
            if self.experts <= 1 || self.expert_stride == matrix {
                let x = Weight::new(self.bytes(), self.dtype, shape).ok()?;
                return repack::run(repack::Args { y, x }, &Exec::default()).ok();
            }
            let (from, to) = (self.dtype.bytes(self.expert_stride)?, self.rows * self.row_bytes());
            y.par_chunks_exact_mut(to.max(1)).enumerate().try_for_each(|(e, y)| {
                let x = Weight::new(self.bytes().get(e * from..)?, self.dtype, [self.rows, self.cols]).ok()?;
                repack::run(repack::Args { y, x }, &Exec::default().parts(1)).ok()
            })
        })
    }

    /// Tells the system that the bytes in the file's memory map are not needed any more: they are read again if they
    /// are.
    fn forget(&self) {
        if let Store::Mapped(map) = &self.store {
            // SAFETY: a read-only map of a file keeps its contents; the range lies inside the map.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.start, self.len) };
        }
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.cols / self.dtype.block() * self.dtype.block_bytes()
    }

    /// Both are the same bytes.
    fn shares(&self, other: &Tensor) -> bool {
        self.bytes().as_ptr() == other.bytes().as_ptr() && self.len == other.len
    }

    /// The bytes lie in the file's memory map.
    pub fn is_mapped(&self) -> bool {
        matches!(self.store, Store::Mapped(_))
    }

    /// The matrix of one expert, sharing memory.
    pub fn expert(&self, expert: usize) -> Option<Tensor> {
        if expert >= self.experts {
            return None;
        }
        let start = self.start + self.dtype.bytes(expert * self.expert_stride)?;
        Tensor::new(self.store.clone(), start, self.dtype, [1, self.rows, self.cols], self.rows * self.cols)
    }

    /// Rows `first..first + count` of every expert, sharing memory.
    pub fn row_range(&self, first: usize, count: usize) -> Option<Tensor> {
        if first.checked_add(count)? > self.rows {
            return None;
        }
        let start = self.start + self.dtype.bytes(first * self.cols)?;
        let stride = if self.experts > 1 { self.expert_stride } else { count * self.cols };
        Tensor::new(self.store.clone(), start, self.dtype, [self.experts, count, self.cols], stride)
    }

    /// A matrix of its own memory whose row i is row `rows[i]` of this one: whole rows move, so every type keeps its bits.
    pub fn gather_rows(&self, rows: impl ExactSizeIterator<Item = usize>) -> Option<Tensor> {
        let (from, size) = (self.bytes(), self.row_bytes());
        Tensor::owned(self.dtype, [1, rows.len(), self.cols], |to| {
            for (out, row) in to.chunks_exact_mut(size.max(1)).zip(rows) {
                out.copy_from_slice(from.get(row.checked_mul(size)?..)?.get(..size)?);
            }
            Some(())
        })
    }

    /// All elements in order, for F32, F16 and BF16; `None` for block types, which the `quant` operator reads.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let mut values = Vec::with_capacity(self.experts * self.rows * self.cols);
        let (matrix, stride) = (self.rows * self.row_bytes(), self.dtype.bytes(self.expert_stride)?);
        for expert in 0..self.experts {
            let bytes = self.bytes().get(expert * stride..)?.get(..matrix)?;
            match self.dtype {
                DType::F32 => {
                    values.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                }
                DType::F16 => values.extend(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
                DType::BF16 => values.extend(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
                _ => return None,
            }
        }
        Some(values)
    }
}

/// A model's weights. Norm weights are plain factors: files that store them zero-centred are converted.
#[derive(Debug, Clone)]
pub struct Weights {
    /// `[vocab][hidden]`.
    pub token_embd: Tensor,
    /// `[hidden]`.
    pub output_norm: Vec<f32>,
    /// `[vocab][hidden]`; the embedding itself in tied models.
    pub output: Tensor,
    /// One entry a layer, as `Config::layers`.
    pub layers: Vec<Layer>,
}

impl Weights {
    /// Run-time repack: interleaves the rows of every weight that allows it, tensor after tensor, telling `progress`
    /// how many bytes of how many are done. Only one tensor is held twice at a time. A table that is also the output of
    /// a tied model stays as it is.
    pub fn repack(&mut self, progress: &mut dyn FnMut(u64, u64)) {
        self.repack_those(|_, _| true, true, progress);
    }

    /// As [`Weights::repack`], for the layers' parts that are `wanted`: mixers (false) and feed-forwards (true).
    pub(crate) fn repack_those(
        &mut self,
        wanted: impl Fn(usize, bool) -> bool,
        output: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) {
        let tied = self.output.shares(&self.token_embd);
        let mut weights: Vec<&mut Tensor> = Vec::new();
        for (i, layer) in self.layers.iter_mut().enumerate() {
            match &mut layer.mixer {
                _ if !wanted(i, false) => {}
                Mixer::Delta(w) => weights.extend([&mut w.qkv, &mut w.z, &mut w.ba, &mut w.out]),
                Mixer::Attention(w) => weights.extend([&mut w.q, &mut w.k, &mut w.v, &mut w.o]),
            }
            match &mut layer.ffn {
                _ if !wanted(i, true) => {}
                Ffn::Dense(w) => weights.extend([&mut w.gate, &mut w.up, &mut w.down]),
                Ffn::Moe(w) => {
                    weights.extend([&mut w.router, &mut w.gate, &mut w.up, &mut w.down]);
                    if let Some(Shared { expert: w, .. }) = &mut w.shared {
                        weights.extend([&mut w.gate, &mut w.up, &mut w.down]);
                    }
                }
            }
        }
        if !tied && output {
            weights.push(&mut self.output);
        }
        let total = weights.iter().map(|w| w.packed_bytes() as u64).sum();
        let mut done = 0;
        for weight in weights {
            if let Some(new) = weight.interleaved() {
                weight.forget();
                *weight = new;
            }
            done += weight.packed_bytes() as u64;
            progress(done, total);
        }
    }
}

/// One layer: x += mixer(norm(x)), then x += ffn(norm(x)).
#[derive(Debug, Clone)]
pub struct Layer {
    /// `[hidden]`, before the mixer.
    pub attn_norm: Vec<f32>,
    /// `[hidden]`, before the feed-forward.
    pub post_attention_norm: Vec<f32>,
    /// Token mixer.
    pub mixer: Mixer,
    /// Feed-forward.
    pub ffn: Ffn,
}

/// A layer's token mixer.
#[derive(Debug, Clone)]
pub enum Mixer {
    /// Gated DeltaNet.
    Delta(Delta),
    /// Full attention.
    Attention(Attention),
}

/// Gated DeltaNet.
#[derive(Debug, Clone)]
pub struct Delta {
    /// `[2·HK·K + HV·V][hidden]`: the rows of q, of k, of v, each by head.
    pub qkv: Tensor,
    /// `[HV·V][hidden]`: z, the output gate.
    pub z: Tensor,
    /// `[2·HV][hidden]`: for every key head the r rows of β, then the r rows of α.
    pub ba: Tensor,
    /// `[2·HK·K + HV·V][W]`, oldest tap first.
    pub conv: Vec<f32>,
    /// `[HV]`, added to α.
    pub dt_bias: Vec<f32>,
    /// `[HV]`, −exp(A_log): g = a · softplus(α + dt_bias).
    pub a: Vec<f32>,
    /// `[V]`, the gated norm's factor.
    pub norm: Vec<f32>,
    /// `[hidden][HV·V]`.
    pub out: Tensor,
}

/// Full attention with an output gate.
#[derive(Debug, Clone)]
pub struct Attention {
    /// `[HQ·2·D][hidden]`: for every head the D rows of q, then the D rows of the gate.
    pub q: Tensor,
    /// `[HKV·D][hidden]`.
    pub k: Tensor,
    /// `[HKV·D][hidden]`.
    pub v: Tensor,
    /// `[hidden][HQ·D]`.
    pub o: Tensor,
    /// `[D]`.
    pub q_norm: Vec<f32>,
    /// `[D]`.
    pub k_norm: Vec<f32>,
}

/// A layer's feed-forward.
// There is one a layer: a box would save nothing that counts.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone)]
pub enum Ffn {
    /// One SwiGLU.
    Dense(Swiglu),
    /// Routed experts.
    Moe(Moe),
}

/// down(silu(gate x) · up x).
#[derive(Debug, Clone)]
pub struct Swiglu {
    /// `[ff][hidden]`.
    pub gate: Tensor,
    /// `[ff][hidden]`.
    pub up: Tensor,
    /// `[hidden][ff]`.
    pub down: Tensor,
}

/// Routed experts, and the shared one.
#[derive(Debug, Clone)]
pub struct Moe {
    /// `[experts][hidden]`.
    pub router: Tensor,
    /// `[experts][ff][hidden]`; with `up` it may be two views into one merged tensor.
    pub gate: Tensor,
    /// `[experts][ff][hidden]`.
    pub up: Tensor,
    /// `[experts][hidden][ff]`.
    pub down: Tensor,
    /// The expert that every token takes; absent where `MoeConfig::shared_ff` is 0.
    pub shared: Option<Shared>,
}

/// The shared expert: sigmoid(gate_vec · x) · swiglu(x).
#[derive(Debug, Clone)]
pub struct Shared {
    /// `[hidden]`.
    pub gate_vec: Vec<f32>,
    /// The expert, of width `MoeConfig::shared_ff`.
    pub expert: Swiglu,
}
