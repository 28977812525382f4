//! Strided arrays for the kernels under test: inputs whose gaps hold NaN, outputs that are poisoned before the call and
//! lie between guard zones, so that a stray read or write shows. One end of every array lies at inaccessible memory.

use crate::compare::Failure;
use crate::guard::{place, Guarded, Place};
use crate::record;
use half::{bf16, f16};
use qwen3next_kernels::memory::Float;
use qwen3next_kernels::{Error, View, ViewMut};

/// What outputs and gaps hold before a call: a NaN with a payload no arithmetic makes.
pub const POISON: u32 = 0x7fc0_dead;

/// Elements of guard zone before and after an output.
const GUARD: usize = 64;

/// A float that arrays hold.
pub trait Value: Float {
    /// A NaN with a payload no arithmetic makes.
    const POISON: Self;

    /// The bits, widened with zeros.
    fn bits(self) -> u32;

    /// The nearest one.
    fn nearest(x: f32) -> Self;

    /// The same number.
    fn wide(self) -> f32;
}

impl Value for f32 {
    const POISON: f32 = f32::from_bits(POISON);

    fn bits(self) -> u32 {
        self.to_bits()
    }

    fn nearest(x: f32) -> f32 {
        x
    }

    fn wide(self) -> f32 {
        self
    }
}

impl Value for bf16 {
    const POISON: bf16 = bf16::from_bits(0x7fda);

    fn bits(self) -> u32 {
        self.to_bits().into()
    }

    fn nearest(x: f32) -> bf16 {
        bf16::from_f32(x)
    }

    fn wide(self) -> f32 {
        self.to_f32()
    }
}

impl Value for f16 {
    const POISON: f16 = f16::from_bits(0x7ead);

    fn bits(self) -> u32 {
        self.to_bits().into()
    }

    fn nearest(x: f32) -> f16 {
        f16::from_f32(x)
    }

    fn wide(self) -> f32 {
        self.to_f32()
    }
}

crate::choice! {
    /// How an array lies in its buffer.
    pub enum Layout {
        /// Row-major without gaps.
        Packed = "packed",
        /// Every axis has three elements of gap, and the first element is misaligned unless inaccessible memory precedes
        /// it.
        Gaps = "gaps",
    }
}

impl Layout {
    fn strides<const R: usize>(self, shape: [usize; R]) -> [usize; R] {
        let mut strides = [1; R];
        for i in (0..R.saturating_sub(1)).rev() {
            let gap = if self == Layout::Gaps { 3 } else { 0 };
            strides[i] = strides[i + 1] * shape[i + 1].max(1) + gap;
        }
        strides
    }
    /// Elements before the first: none where inaccessible memory is to precede it.
    pub fn offset(self) -> usize {
        usize::from(self == Layout::Gaps && place() == Place::End)
    }
}

fn extent<const R: usize>(shape: [usize; R], strides: [usize; R]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    1 + shape.iter().zip(strides).map(|(&n, s)| (n - 1) * s).sum::<usize>()
}

/// Offsets of all elements of a view, in row-major order.
fn offsets<const R: usize>(shape: [usize; R], strides: [usize; R]) -> Vec<usize> {
    let mut list = vec![0];
    for (&n, s) in shape.iter().zip(strides) {
        list = list.iter().flat_map(|&base| (0..n).map(move |i| base + i * s)).collect();
    }
    list
}

/// Elements of guard zone before and after an array: `guard` on the side where memory goes on.
pub fn zones(guard: usize) -> (usize, usize) {
    match place() {
        _ if !crate::guard::AVAILABLE => (guard, guard),
        Place::End => (guard, 0),
        Place::Start => (0, guard),
    }
}

/// An input array of `R` axes.
#[derive(Debug, Clone)]
pub struct Input<const R: usize, E: Value = f32> {
    buffer: Guarded<E>,
    shape: [usize; R],
    strides: [usize; R],
    offset: usize,
}

impl<const R: usize, E: Value> Input<R, E> {
    /// Lays out `packed` (row-major, of `shape`); gaps hold poison.
    pub fn new(packed: &[E], shape: [usize; R], layout: Layout) -> Self {
        assert_eq!(packed.len(), shape.iter().product::<usize>());
        let (strides, offset) = (layout.strides(shape), layout.offset());
        let mut buffer = Guarded::filled(offset + extent(shape, strides), E::POISON);
        for (&x, at) in packed.iter().zip(offsets(shape, strides)) {
            buffer[offset + at] = x;
        }
        Input { buffer, shape, strides, offset }
    }

    /// The view to pass to the kernel.
    pub fn view(&self) -> View<'_, R, E> {
        View::strided(&self.buffer[self.offset..], self.shape, self.strides).expect("laid out for this view")
    }
}

/// An output array of `R` axes between a guard zone on one side and inaccessible memory on the other.
#[derive(Debug, Clone)]
pub struct Output<const R: usize, E: Value = f32> {
    buffer: Guarded<E>,
    shape: [usize; R],
    strides: [usize; R],
    start: usize,
    end: usize,
}

impl<const R: usize> Output<R> {
    /// A poisoned output.
    pub fn new(shape: [usize; R], layout: Layout) -> Self {
        Output::poisoned(shape, layout)
    }

    /// An output that starts with these contents (for in-place calls and pools).
    pub fn with(packed: &[f32], shape: [usize; R], layout: Layout) -> Self {
        let mut out = Output::new(shape, layout);
        assert_eq!(packed.len(), shape.iter().product::<usize>());
        for (&x, at) in packed.iter().zip(offsets(shape, out.strides)) {
            out.buffer[out.start + at] = x;
        }
        out
    }
}

impl<const R: usize, E: Value> Output<R, E> {
    /// As [`Output::new`], of any type.
    pub fn poisoned(shape: [usize; R], layout: Layout) -> Self {
        let strides = layout.strides(shape);
        let (before, after) = zones(GUARD);
        let start = before + layout.offset();
        let end = start + extent(shape, strides);
        let buffer = Guarded::filled(end + after, E::POISON);
        Output { buffer, shape, strides, start, end }
    }

    /// The view to pass to the kernel.
    pub fn view(&mut self) -> ViewMut<'_, R, E> {
        self.try_view().expect("laid out for this view")
    }

    fn try_view(&mut self) -> Result<ViewMut<'_, R, E>, Error> {
        ViewMut::strided(&mut self.buffer[self.start..self.end], self.shape, self.strides)
    }

    /// The elements, packed and widened. Fails where the kernel wrote outside the view or left an element unwritten.
    pub fn read(&self, what: &str) -> Result<Vec<f32>, Failure> {
        let at = offsets(self.shape, self.strides);
        if record::active() {
            return Ok(at.iter().map(|&i| self.buffer[self.start + i].wide()).collect());
        }
        let poison = E::POISON.bits();
        let mut inside = vec![false; self.buffer.len()];
        at.iter().for_each(|&i| inside[self.start + i] = true);
        if let Some(i) = (0..inside.len()).find(|&i| !inside[i] && self.buffer[i].bits() != poison) {
            return Err(Failure::new(format!(
                "{what}: wrote outside the array, {} elements from its first",
                i as i64 - self.start as i64
            )));
        }
        let values: Vec<E> = at.iter().map(|&i| self.buffer[self.start + i]).collect();
        match values.iter().position(|x| x.bits() == poison) {
            Some(i) => Err(Failure::new(format!("{what}: element {i} of shape {:?} was left unwritten", self.shape))),
            None => Ok(values.into_iter().map(Value::wide).collect()),
        }
    }
}

/// A pool of three entries that lie more than 2³¹ elements apart: an offset in 32 bits leads elsewhere, for the third entry
/// into memory that is the pool's own and zero. Only what is touched takes room.
pub struct FarPool(memmap2::MmapMut);

impl FarPool {
    /// Entries.
    pub const SLOTS: usize = 3;

    /// Elements from an entry to the next; two of them are 2²¹ in 32 bits.
    pub const STRIDE: usize = (1 << 31) + (1 << 20);

    /// A pool with `entries` (slot, content), zero elsewhere. Contents have less than 2²⁰ elements.
    pub fn new(entries: &[(usize, &[f32])]) -> Result<FarPool, Failure> {
        let bytes = 4 * FarPool::SLOTS * FarPool::STRIDE;
        let map = memmap2::MmapOptions::new().len(bytes).no_reserve_swap().map_anon();
        let map = map.map_err(|e| Failure::new(format!("no {bytes} bytes of address space for a pool: {e}")))?;
        let mut pool = FarPool(map);
        for &(slot, content) in entries {
            pool.elements()[slot * FarPool::STRIDE..][..content.len()].copy_from_slice(content);
        }
        Ok(pool)
    }

    /// All elements.
    pub fn elements(&mut self) -> &mut [f32] {
        // SAFETY: a map is aligned to a page, its length is a multiple of 4, and any bits are a float.
        unsafe { self.0.align_to_mut::<f32>().1 }
    }
}
