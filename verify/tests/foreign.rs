//! A kernel of another crate, judged by the suite of its operator: a right one passes, a wrong one fails with what
//! repeats it.

use qwen3next_kernels::{ffi::q3n_solve_tri_args as Args, solve_tri, Isa, Variant};
use qwen3next_verify::cases::solve_tri::SolveTri;
use qwen3next_verify::suite::{assert_passed, run_on, Options, Verdict};
use std::ffi::c_void;

unsafe extern "C" fn items(a: *const Args) -> i64 {
    // SAFETY: a variant is called with a valid args struct.
    unsafe { (*a).batch }
}

unsafe extern "C" fn no_scratch(_: *const Args) -> i64 {
    0
}

/// Forward substitution with sums in f64; a `DEAF` one divides by the diagonal whatever `unit_diagonal` says.
unsafe extern "C" fn solve<const DEAF: bool>(a: *const Args, begin: i64, end: i64, _: *mut c_void) -> i32 {
    // SAFETY: checked args: every array has the elements that its sizes and strides reach.
    unsafe {
        let a = &*a;
        for e in begin..end {
            for (i, c) in (0..a.n).flat_map(|i| (0..a.m).map(move |c| (i, c))) {
                let l = |j: i64| f64::from(*a.l.offset((e * a.l_batch + i * a.l_row + j) as isize));
                let x = |j: i64| a.x.offset((e * a.x_batch + j * a.x_row + c) as isize);
                let mut sum = match a.b.is_null() {
                    true => f64::from(u8::from(c == i)),
                    false => f64::from(*a.b.offset((e * a.b_batch + i * a.b_row + c) as isize)),
                };
                for j in 0..i {
                    sum -= l(j) * f64::from(*x(j));
                }
                *x(i) = if a.unit_diagonal != 0 && !DEAF { sum } else { sum / l(i) } as f32;
            }
        }
    }
    0
}

#[test]
fn a_right_kernel_passes() {
    // SAFETY: `solve` reads and writes what the header allows, for the items of its range alone.
    let mine = unsafe { Variant::<solve_tri::Op>::foreign("mine", Isa::SCALAR, items, no_scratch, solve::<false>) };
    assert_passed(&run_on::<SolveTri>(&Options::default(), &[mine]).unwrap());
}

#[test]
fn a_wrong_kernel_fails_and_the_printed_options_repeat_it() {
    // SAFETY: as above; it is wrong, but stays inside its arrays.
    let deaf = unsafe { Variant::<solve_tri::Op>::foreign("deaf", Isa::SCALAR, items, no_scratch, solve::<true>) };
    let rows = run_on::<SolveTri>(&Options::quick(), &[deaf]).unwrap();
    let row = rows.iter().find(|r| r.check == "reference").unwrap();
    let Verdict::Failed { failure, reproduce } = &row.verdict else { panic!("{row:?}") };
    assert!(failure.contains("NaN"), "the diagonal is not to be read and holds NaN: {failure}");
    assert!(reproduce.starts_with("Options { check: Some(\"reference\".into()), case: Some(\"batch="), "{reproduce}");
    assert!(reproduce.contains("unit=true"), "{reproduce}");

    let case = reproduce.split('"').nth(3).unwrap();
    let seed = reproduce.split("seed: ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    let options = Options { check: Some("reference".into()), case: Some(case.into()), seed, ..Options::default() };
    let again = run_on::<SolveTri>(&options, &[deaf]).unwrap();
    assert_eq!(again.len(), 1);
    assert!(matches!(&again[0].verdict, Verdict::Failed { failure: f, .. } if f == failure), "{:?}", again[0]);
}
