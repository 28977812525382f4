//! The memory checks catch what they are for: kernels that read outside their arrays, write past their scratch or trust
//! what is in it.

use qwen3next_kernels::ffi::{q3n_rope_args, q3n_rope_best, q3n_rope_run};
use qwen3next_kernels::{rope, Isa, Variant};
use qwen3next_verify::cases::rope::Rope;
use qwen3next_verify::suite::{run_on, Options, Verdict};
use std::ffi::c_void;

unsafe extern "C" fn items(raw: *const q3n_rope_args) -> i64 {
    // SAFETY: the caller passes checked args, as to every function of this file; the table's entries are complete.
    unsafe { (*q3n_rope_best(raw)).items.expect("complete")(raw) }
}

unsafe extern "C" fn scratch_bytes(raw: *const q3n_rope_args) -> i64 {
    // SAFETY: as above.
    unsafe { (*q3n_rope_best(raw)).scratch_bytes.expect("complete")(raw) }
}

/// The kernel itself.
unsafe fn right(raw: *const q3n_rope_args, begin: i64, end: i64, scratch: *mut c_void) -> i32 {
    // SAFETY: checked args and the scratch that the best variant asked for.
    unsafe { q3n_rope_run(std::ptr::null(), raw, begin, end, scratch, scratch_bytes(raw)) }
}

/// Elements of x from the first to one past the last.
fn extent(a: &q3n_rope_args) -> isize {
    ((a.T - 1) * a.x_t + (a.H - 1) * a.x_h + a.D) as isize
}

unsafe extern "C" fn reads_past_x(raw: *const q3n_rope_args, begin: i64, end: i64, scratch: *mut c_void) -> i32 {
    // SAFETY: none: the element after x is not the kernel's. The process is to die here.
    unsafe {
        std::hint::black_box((*raw).x.offset(extent(&*raw)).read_volatile());
        right(raw, begin, end, scratch)
    }
}

unsafe extern "C" fn reads_before_x(raw: *const q3n_rope_args, begin: i64, end: i64, scratch: *mut c_void) -> i32 {
    // SAFETY: none: the element before x is not the kernel's. With x after inaccessible memory the process dies here.
    unsafe {
        std::hint::black_box((*raw).x.sub(1).read_volatile());
        right(raw, begin, end, scratch)
    }
}

unsafe extern "C" fn reads_past_pos(raw: *const q3n_rope_args, begin: i64, end: i64, scratch: *mut c_void) -> i32 {
    // SAFETY: none, as in `reads_past_x`.
    unsafe {
        std::hint::black_box((*raw).pos.offset((*raw).T as isize).read_volatile());
        right(raw, begin, end, scratch)
    }
}

unsafe extern "C" fn writes_past_scratch(raw: *const q3n_rope_args, begin: i64, end: i64, scratch: *mut c_void) -> i32 {
    // SAFETY: none: the byte after the scratch is not the kernel's; under the guard it belongs to the guard's zone.
    unsafe {
        scratch.cast::<u8>().offset(scratch_bytes(raw) as isize).write(1);
        right(raw, begin, end, scratch)
    }
}

unsafe extern "C" fn writes_before_scratch(
    raw: *const q3n_rope_args,
    begin: i64,
    end: i64,
    scratch: *mut c_void,
) -> i32 {
    // SAFETY: none, as in `writes_past_scratch`.
    unsafe {
        scratch.cast::<u8>().sub(1).write(1);
        right(raw, begin, end, scratch)
    }
}

unsafe extern "C" fn trusts_scratch(raw: *const q3n_rope_args, begin: i64, end: i64, scratch: *mut c_void) -> i32 {
    // SAFETY: the element is the kernel's, but nothing wrote it; y's first element exists where an item does.
    unsafe {
        let left = if scratch_bytes(raw) > 0 { 0.0 * scratch.cast::<f32>().read() } else { 0.0 };
        let status = right(raw, begin, end, scratch);
        if (*raw).H * (*raw).D > 0 {
            *(*raw).y.offset((begin * (*raw).y_t) as isize) += left;
        }
        status
    }
}

type Run = unsafe extern "C" fn(*const q3n_rope_args, i64, i64, *mut c_void) -> i32;

/// Failures of the suite on this kernel, one text a check.
fn failures(name: &'static str, run: Run) -> Vec<String> {
    // SAFETY: none: that these kernels break the contract is what is tested, and every breach is caught before it
    // touches memory of anything else.
    let variant: Variant<rope::Op> = unsafe { Variant::foreign(name, Isa::SCALAR, items, scratch_bytes, run) };
    let rows = run_on::<Rope>(&Options::quick(), &[variant]).expect("options name existing things");
    let failed = rows.into_iter().filter_map(|row| match row.verdict {
        Verdict::Failed { failure, .. } => Some(failure),
        _ => None,
    });
    failed.collect()
}

#[test]
fn a_write_outside_the_scratch_is_told() {
    for (name, run, side) in
        [("past", writes_past_scratch as Run, "past"), ("before", writes_before_scratch as Run, "before")]
    {
        let failures = failures(name, run);
        assert!(!failures.is_empty());
        assert!(failures.iter().all(|f| f.contains("scratch: the kernel wrote") && f.contains(side)), "{failures:?}");
    }
}

#[test]
fn a_read_of_unwritten_scratch_shows() {
    let failures = failures("trusts", trusts_scratch);
    assert!(failures.iter().any(|f| f.contains("NaN")), "{failures:?}");
}

#[test]
fn the_kernel_itself_passes() {
    unsafe extern "C" fn run(raw: *const q3n_rope_args, begin: i64, end: i64, scratch: *mut c_void) -> i32 {
        // SAFETY: the caller's promise.
        unsafe { right(raw, begin, end, scratch) }
    }
    assert_eq!(failures("right", run), Vec::<String>::new());
}

#[cfg(unix)]
mod faults {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    const KERNELS: [(&str, Run); 3] =
        [("reads_past_x", reads_past_x), ("reads_before_x", reads_before_x), ("reads_past_pos", reads_past_pos)];
    const WHICH: &str = "Q3N_TEST_FAULT";

    #[test]
    #[ignore = "dies of a signal: a_read_outside_an_array_is_told runs it in a process of its own"]
    fn child() {
        let which = std::env::var(WHICH).unwrap_or_default();
        let (name, run) = KERNELS.into_iter().find(|(name, _)| *name == which).expect("the parent names a kernel");
        println!("survived with {:?}", failures(name, run));
    }

    #[test]
    fn a_read_outside_an_array_is_told() {
        for (name, _) in KERNELS {
            let child = std::process::Command::new(std::env::current_exe().expect("this test"))
                .args(["--exact", "faults::child", "--ignored", "--nocapture"])
                .env(WHICH, name)
                .output()
                .expect("the test runs again");
            let text = String::from_utf8_lossy(&child.stderr);
            let signal = child.status.signal();
            assert!(matches!(signal, Some(libc::SIGSEGV | libc::SIGBUS)), "{name}: {:?}\n{text}", child.status);
            // The command line can't reach a variant of this file: it is told as options.
            let told = ["died of SIG", "check: Some(", "case: Some(", "seed: "].iter().all(|part| text.contains(part));
            assert!(told, "{name}: {text}");
        }
    }
}
