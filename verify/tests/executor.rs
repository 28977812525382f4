//! The host executor of CUDA kernels (csrc/cuda/README.md): right kernels run clean, planted mistakes are found.
#![cfg(feature = "cuda-host")]

use qwen3next_kernels::ffi;
// The kernels are linked into this crate.
use qwen3next_verify as _;
use std::ffi::{c_char, CStr};

// Defined in executor/kernels.cu.
unsafe extern "C" {
    fn q3n_executor_count() -> i64;
    fn q3n_executor_name(i: i64) -> *const c_char;
    fn q3n_executor_found(i: i64) -> *const c_char;
    fn q3n_executor_refused(i: i64) -> i32;
    fn q3n_executor_run(i: i64, status: *mut i32) -> i32;
}

/// The text at `p`, if there is one.
///
/// # Safety
/// `p` is NULL or NUL-terminated.
unsafe fn text(p: *const c_char) -> Option<String> {
    // SAFETY: the same promise.
    (!p.is_null()).then(|| unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned())
}

/// Runs case `i`; `Err` tells what differs from what the case expects.
fn judge(i: i64) -> Result<(), String> {
    let mut status = 0;
    // SAFETY: i is below the count; the texts are literals, the report belongs to this thread.
    let (name, right, wanted, refused, report) = unsafe {
        let right = q3n_executor_run(i, &mut status) != 0;
        let report = text(ffi::q3n_cuda_host_report()).unwrap_or_default();
        let name = text(q3n_executor_name(i)).unwrap_or_default();
        (name, right, text(q3n_executor_found(i)), q3n_executor_refused(i), report)
    };
    match wanted {
        None if status != refused => Err(format!("{name}: status {status}, expected {refused}: {report}")),
        None if !right => Err(format!("{name}: wrong numbers")),
        Some(_) if status as u32 & 0xff != ffi::Q3N_DEVICE => Err(format!("{name}: nothing was found")),
        Some(wanted) if !report.contains(&wanted) => Err(format!("{name}: found {report:?}, expected {wanted:?}")),
        _ => Ok(()),
    }
}

#[test]
fn right_kernels_run_clean_and_planted_mistakes_are_found() {
    // SAFETY: takes nothing, returns the length of a table.
    let count = unsafe { q3n_executor_count() };
    let wrong: Vec<String> = (0..count).filter_map(|i| judge(i).err()).collect();
    assert!(count > 20 && wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn launches_of_many_threads_do_not_disturb_each_other() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                // SAFETY: as above.
                let count = unsafe { q3n_executor_count() };
                // SAFETY: below the length of the table. Right kernels write only arrays of their own.
                let right = (0..count).filter(|&i| unsafe { q3n_executor_found(i) }.is_null());
                right.cycle().take(60).for_each(|i| judge(i).unwrap());
            });
        }
    });
}
