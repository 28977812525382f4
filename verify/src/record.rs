//! Cases as files, for machines that have a C compiler and no Rust: `neon/replay.c` runs a variant on them there.
//!
//! A check that only compares results with a reference runs once on a variant that computes nothing: it keeps its
//! arguments and every array they point to, and fills the outputs with numbered tags. Where the check then compares
//! outputs with what it expects, the tags say which element is meant. So a file holds the inputs and bounds of the
//! check itself. The format: neon/README.md.

use crate::buffer::POISON;
use crate::compare::{Failure, Metrics};
use crate::guard::{self, Place};
use crate::suite::{Options, Suite};
use qwen3next_kernels::{ffi, Operator, Variant};
use std::cell::RefCell;
use std::ffi::c_void;
use std::mem::offset_of;

/// The checks whose cases are written: those that compare every output of every call with what they knew before it.
fn checks(op: &str) -> &'static [&'static str] {
    match op {
        "activations" => &["same_bytes"],
        "repack" => &["layout"],
        _ => &["reference", "infinities", "identity", "origin", "any_bytes"],
    }
}

/// Where the args struct of an operator holds pointers: to outputs, to inputs. `None` where outputs are neither f32 nor
/// compared as bytes.
fn pointers(op: &str) -> Option<[Vec<usize>; 2]> {
    macro_rules! fields {
        ($args:ident: $($output:ident)*; $($input:ident)*) => {
            [vec![$(offset_of!(ffi::$args, $output)),*], vec![$(offset_of!(ffi::$args, $input)),*]]
        };
    }
    Some(match op {
        "gated_delta" => fields!(
            q3n_gated_delta_args: o state_out snapshots; q k v g beta state_in slot_in slot_out cu_seqlens
        ),
        "solve_tri" => fields!(q3n_solve_tri_args: x; l b),
        "causal_conv" => fields!(
            q3n_causal_conv_args: y state_out snapshots; x w bias state_in slot_in slot_out cu_seqlens
        ),
        "norm" => fields!(q3n_norm_args: y; x w z),
        "rope" => fields!(q3n_rope_args: y; x pos),
        "attention" => fields!(q3n_attention_args: o lse; q k v gate mask sinks slot kv_len cu_seqlens),
        "attention_merge" => fields!(q3n_attention_merge_args: o lse; part_o part_lse gate sinks),
        "dequantize" => fields!(q3n_dequantize_args: y; x),
        "matmul" => fields!(q3n_matmul_args: y; x w),
        "moe_up" => fields!(q3n_moe_up_args: h; x gate up order offsets),
        "moe_down" => fields!(q3n_moe_down_args: y; h weights down order offsets),
        "activations" => fields!(q3n_activations_args: y; x),
        "repack" => fields!(q3n_repack_args: y; x),
        "gather" => fields!(q3n_gather_args: y; table ids),
        "add" => fields!(q3n_add_args: y; x),
        "delta_gates" => fields!(q3n_delta_gates_args: g beta; ba a dt_bias),
        "row_gate" => fields!(q3n_row_gate_args: y; x w),
        _ => return None,
    })
}

/// What consecutive elements of an output must hold.
enum Expected {
    /// Want and bound of each.
    Within(Vec<(f64, f64)>),
    /// Bits of each; any NaN stands for every NaN.
    Bits(Vec<u32>),
    /// Four bytes each, which are no f32.
    Bytes(Vec<u32>),
}

/// An array that args point into, from the first byte pointed at.
struct Array {
    data: Vec<u8>,
    /// (offset in the args, offset in the array)
    pointers: Vec<(usize, usize)>,
    output: bool,
    /// (first element, what it and the following ones must hold)
    expected: Vec<(usize, Expected)>,
}

/// One call of the operator.
struct Call {
    args: Vec<u8>,
    arrays: Vec<Array>,
}

#[derive(Clone, Copy)]
struct Live {
    at: usize,
    bytes: usize,
    /// What it holds is no business of the check.
    lent: bool,
}

#[derive(Default)]
struct Recording {
    /// The arrays that live.
    live: Vec<Live>,
    calls: Vec<Call>,
    /// (first tag, tags, call, array): the tags of an output's elements, in order.
    tags: Vec<(u32, u32, usize, usize)>,
    next_tag: u32,
    failure: Option<String>,
}

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// `f` of what this thread records, if it does.
fn with<R>(f: impl FnOnce(&mut Recording) -> R) -> Option<R> {
    RECORDING.try_with(|r| r.borrow_mut().as_mut().map(f)).ok().flatten()
}

/// This thread records: outputs hold tags, not results.
pub(crate) fn active() -> bool {
    with(|_| ()).is_some()
}

/// An array was made.
pub(crate) fn made(address: usize, bytes: usize) {
    with(|r| r.live.push(Live { at: address, bytes, lent: false }));
}

/// An array that lies elsewhere and lives as long as the check, or until it is [`gone`]. As an output it is poisoned before
/// the call.
pub(crate) fn lend<T>(array: &[T]) {
    // An empty one has no address of its own.
    if !array.is_empty() {
        with(|r| r.live.push(Live { at: array.as_ptr() as usize, bytes: size_of_val(array), lent: true }));
    }
}

/// An array is gone.
pub(crate) fn gone(address: usize) {
    with(|r| r.live.retain(|array| array.at != address));
}

/// Keeps what a bounded comparison expects. `None`: nothing of it is recorded.
pub(crate) fn within(what: &str, got: &[f32], want: &[f64], bound: &[f64]) -> Option<Result<Metrics, Failure>> {
    let take = |range: std::ops::Range<usize>| {
        Expected::Within(want[range.clone()].iter().copied().zip(bound[range].iter().copied()).collect())
    };
    with(|r| r.expect(what, got, take)).flatten()
}

/// Keeps what a bitwise comparison expects. `None`: nothing of it is recorded.
pub(crate) fn bits(what: &str, got: &[f32], want: &[f32]) -> Option<Result<Metrics, Failure>> {
    let take = |range: std::ops::Range<usize>| Expected::Bits(want[range].iter().map(|w| w.to_bits()).collect());
    with(|r| r.expect(what, got, take)).flatten()
}

/// Keeps what a comparison of bytes expects: the words of an output. `None`: nothing of it is recorded.
pub(crate) fn bytes(what: &str, got: &[u8], want: &[u8]) -> Option<Result<Metrics, Failure>> {
    let words = |bytes: &[u8]| -> Vec<u32> {
        bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes"))).collect()
    };
    let (got, want): (Vec<f32>, _) = (words(got).into_iter().map(f32::from_bits).collect(), words(want));
    with(|r| r.expect(what, &got, |range| Expected::Bytes(want[range].to_vec()))).flatten()
}

impl Recording {
    /// (call, array, element) of a value that is a tag.
    fn tagged(&self, value: f32) -> Option<(usize, usize, usize)> {
        let tag = value.to_bits();
        let &(first, count, call, array) = self.tags[..self.tags.partition_point(|t| t.0 <= tag)].last()?;
        (tag - first < count).then(|| (call, array, (tag - first) as usize))
    }

    fn expect(
        &mut self,
        what: &str,
        got: &[f32],
        take: impl Fn(std::ops::Range<usize>) -> Expected,
    ) -> Option<Result<Metrics, Failure>> {
        let at: Vec<_> = got.iter().map(|&g| self.tagged(g)).collect();
        if at.iter().all(Option::is_none) {
            return None;
        }
        let Some(at) = at.into_iter().collect::<Option<Vec<_>>>() else {
            return Some(Err(Failure::new(format!("{what}: outputs among other numbers"))));
        };
        let mut start = 0;
        for i in 1..=at.len() {
            let (call, array, element) = at[i - 1];
            if at.get(i) != Some(&(call, array, element + 1)) {
                self.calls[call].arrays[array].expected.push((element + 1 - (i - start), take(start..i)));
                start = i;
            }
        }
        Some(Ok(Metrics::default()))
    }

    /// Keeps a call and fills its outputs with tags.
    ///
    /// # Safety
    /// `args` is an args struct of this operator; the arrays in `live` live, and nobody else refers to outputs.
    unsafe fn call(&mut self, op: &str, args: &[u8]) -> Result<(), String> {
        let [outputs, inputs] = pointers(op).expect("asked before");
        let mut call = Call { args: args.to_vec(), arrays: Vec::new() };
        let mut found: Vec<(usize, usize, usize)> = Vec::new();
        for field in (0..args.len()).step_by(8) {
            let word = u64::from_le_bytes(args[field..field + 8].try_into().expect("eight bytes")) as usize;
            let is_pointer = outputs.contains(&field) || inputs.contains(&field);
            // The end of an array is where an empty view of it points; nothing else begins there.
            match self.live.iter().position(|array| array.at <= word && word <= array.at + array.bytes) {
                Some(array) if is_pointer => found.push((array, field, word)),
                Some(_) => return Err(format!("{op}: byte {field} of the args is a pointer that nobody told of")),
                // Below the first page lies what stands for the address of an empty array.
                None if is_pointer && word >= 4096 => {
                    return Err(format!("{op}: byte {field} of the args points to no array of the suite"));
                }
                None => {}
            }
        }
        found.sort_unstable();
        for pointers in found.chunk_by(|a, b| a.0 == b.0) {
            let Live { at, bytes, lent } = self.live[pointers[0].0];
            let start = pointers.iter().map(|p| p.2).min().expect("a chunk is not empty");
            let len = at + bytes - start;
            // SAFETY: inside an array that lives.
            let memory = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, len) };
            let output = pointers.iter().any(|p| outputs.contains(&p.1));
            let poison = || POISON.to_le_bytes().into_iter().cycle().take(len).collect();
            call.arrays.push(Array {
                data: if output && lent { poison() } else { memory.to_vec() },
                pointers: pointers.iter().map(|p| (p.1, p.2 - start)).collect(),
                output,
                expected: Vec::new(),
            });
            if output {
                let count = (len / 4) as u32;
                self.tags.push((self.next_tag, count, self.calls.len(), call.arrays.len() - 1));
                for element in memory.chunks_exact_mut(4) {
                    element.copy_from_slice(&self.next_tag.to_le_bytes());
                    self.next_tag += 1;
                }
            }
        }
        self.calls.push(call);
        Ok(())
    }
}

/// The variant's function: records instead of computing.
unsafe extern "C" fn record<O: Operator>(raw: *const O::Raw, _: i64, _: i64, _: *mut c_void) -> i32 {
    // SAFETY: checked args, seen as the bytes that a C kernel gets.
    let args = unsafe { std::slice::from_raw_parts(raw.cast::<u8>(), size_of::<O::Raw>()) };
    with(|r| {
        // SAFETY: arrays that are gone are forgotten, and the caller lends the outputs.
        if let Err(failure) = unsafe { r.call(O::NAME, args) } {
            r.failure.get_or_insert(failure);
        }
    });
    0
}

unsafe extern "C" fn one_item<O: Operator>(_: *const O::Raw) -> i64 {
    1
}

unsafe extern "C" fn no_scratch<O: Operator>(_: *const O::Raw) -> i64 {
    0
}

/// What a variant's name says beside its instruction set: bounds may depend on it. `chunked16` of `chunked16_avx2`.
fn form<O: Operator>(variant: &Variant<O>) -> &'static str {
    let name = variant.name();
    name.strip_suffix(variant.isa().name()).map_or(name, |form| form.trim_end_matches('_'))
}

/// The cases of a suite as a file, and how many. `None`: its outputs are neither f32 nor compared as bytes.
pub(crate) fn cases<S: Suite>(options: &Options) -> Result<Option<(usize, Vec<u8>)>, String> {
    if pointers(S::Op::NAME).is_none() || !guard::AVAILABLE {
        return Ok(None);
    }
    // What is replayed is for CPUs: a form's name, the variant, and what records its calls.
    let mut variants = Vec::<(_, Variant<S::Op>, _)>::new();
    for variant in S::Op::variants().into_iter().filter(|v| v.isa() != qwen3next_kernels::Isa::CUDA_HOST) {
        if !variants.iter().any(|v| v.0 == form(&variant)) {
            // SAFETY: it writes inside the arrays of the outputs, and a call is one item.
            let recorder = unsafe {
                Variant::foreign(
                    variant.name(),
                    qwen3next_kernels::Isa::SCALAR,
                    one_item::<S::Op>,
                    no_scratch::<S::Op>,
                    record::<S::Op>,
                )
            };
            variants.push((form(&variant), variant, recorder));
        }
    }
    let (mut file, mut count) = (b"Q3NCASES".to_vec(), 0);
    file.extend(1u32.to_le_bytes());
    let (all, written, grid) = (S::checks(), checks(S::Op::NAME), S::grid());
    let cases = grid.iter().step_by(options.stride.max(1));
    for (case, check) in cases.flat_map(|case| all.iter().map(move |check| (case, check))) {
        for (form, original, recorder) in variants.iter().filter(|_| written.contains(&check.name)) {
            let case = &S::refusal(original, case).map_or(case.clone(), |(_, without)| without);
            let note = format!("--check {} --case {case} --seed {}", check.name, options.seed);
            RECORDING.set(Some(Recording { next_tag: 1, ..Recording::default() }));
            let outcome = guard::with(Place::End, || (check.run)(recorder, case, options.seed));
            let recording = RECORDING.take().expect("set above");
            if let Some(failure) = recording.failure.or_else(|| outcome.err().map(|f| f.0)) {
                return Err(format!("{note}: {failure}"));
            }
            // Where nothing is expected there is no output: an empty call.
            let expects = |call: &&Call| call.arrays.iter().any(|a| !a.expected.is_empty());
            for call in recording.calls.iter().filter(expects) {
                call.write(&mut file, [S::Op::NAME, form, &note]);
                count += 1;
            }
        }
    }
    Ok(Some((count, file)))
}

impl Call {
    fn write(&self, file: &mut Vec<u8>, names: [&str; 3]) {
        let u32 = |file: &mut Vec<u8>, n: usize| file.extend((n as u32).to_le_bytes());
        let u64 = |file: &mut Vec<u8>, n: usize| file.extend((n as u64).to_le_bytes());
        for name in names {
            u32(file, name.len());
            file.extend(name.as_bytes());
        }
        u32(file, self.args.len());
        file.extend(&self.args);
        u32(file, self.arrays.len());
        for array in &self.arrays {
            u32(file, usize::from(array.output));
            u32(file, array.pointers.len());
            for &(args, inside) in &array.pointers {
                u64(file, args);
                u64(file, inside);
            }
            u64(file, array.data.len());
            file.extend(&array.data);
            u32(file, array.expected.len());
            for (first, expected) in &array.expected {
                u64(file, *first);
                match expected {
                    Expected::Within(list) => {
                        u32(file, 0);
                        u64(file, list.len());
                        list.iter().for_each(|w| file.extend(w.0.to_le_bytes()));
                        list.iter().for_each(|w| file.extend(w.1.to_le_bytes()));
                    }
                    Expected::Bits(list) | Expected::Bytes(list) => {
                        u32(file, if matches!(expected, Expected::Bits(_)) { 1 } else { 2 });
                        u64(file, list.len());
                        list.iter().for_each(|w| file.extend(w.to_le_bytes()));
                    }
                }
            }
        }
    }
}
