//! The inputs of the suites are as hard as their regimes say: what a generator leaves out, no check can find.

use qwen3next_verify::cases::{attention, gated_delta, moe, solve_tri};
use qwen3next_verify::suite::Suite;

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

#[test]
fn delta_rule() {
    use gated_delta::{Case, GateKind, GatedDelta, Inputs, Regime};
    let grid = GatedDelta::grid();
    for t in [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 4096] {
        assert!(grid.iter().any(|c| c.t == t), "T = {t} is not in the grid");
    }
    assert!(grid.iter().any(|c| c.hk == 2 && c.hv == 6 && c.t == 4096));

    let model = grid.iter().find(|c| c.k == 128 && c.v == 128).expect("the model's head size");
    let case = Case { t: 512, regime: Regime::Harsh, gate: GateKind::Scalar, l2norm: false, ..model.clone() };
    let x = Inputs::generate(&case, 1);
    let share = |test: fn(f32) -> bool| x.g.iter().filter(|g| test(**g)).count() as f64 / x.g.len() as f64;
    assert!(x.g.iter().all(|g| (-316.0..=0.0).contains(g)) && x.g.contains(&-316.0) && x.g.contains(&0.0));
    assert!(share(|g| g > -0.001) > 0.3, "little mass near 0");
    assert!(share(|g| g < -2.0) > 0.1, "few closed gates");
    assert!([0.0, 1.0, 2.0].iter().all(|b| x.beta.contains(b)) && x.beta.iter().all(|b| (0.0..=2.0).contains(b)));
    assert!(x.v.iter().any(|v| v.abs() > 24.0));
    let keys: Vec<&[f32]> = x.k.chunks(case.k).collect();
    let near = keys.iter().enumerate().any(|(i, a)| keys[..i].iter().any(|b| dot(a, b) > 0.999));
    assert!(near, "no two keys are nearly parallel");
    assert!(keys.iter().all(|k| (dot(k, k) - 1.0).abs() < 1.0 / 65536.0), "keys are not of unit norm");

    let parallel = Inputs::generate(&Case { regime: Regime::Parallel, ..case.clone() }, 1);
    assert!(parallel.k.chunks(case.k).all(|k| dot(k, &parallel.k[..case.k]) > 0.99));
}

#[test]
fn solve_tri_matrices_are_large() {
    use solve_tri::{Inputs, Regime, SolveTri};
    let grid = SolveTri::grid();
    let large = grid.iter().filter(|c| c.regime == Regime::Delta && c.n >= 64 && c.batch > 0 && !c.inverse);
    let mut seen = 0;
    for case in large {
        let l = Inputs::generate(case, 1).l;
        let rows = l.chunks(case.n).take(case.n).enumerate();
        let norm = rows.map(|(i, row)| row[..i].iter().map(|x| f64::from(x.abs())).sum::<f64>()).fold(0.0, f64::max);
        assert!(norm >= 37.0, "{case}: the norm of A is {norm}");
        seen += 1;
    }
    assert!(seen > 3);
}

#[test]
fn attention_scores_are_large() {
    use attention::{Attention, Problem, Regime};
    let mut largest = 0.0f64;
    for case in Attention::grid().into_iter().filter(|c| c.regime == Regime::Large) {
        let problem = Problem::generate(&case, 1);
        let keys: Vec<&[f32]> = problem.k.chunks(case.d).filter(|k| k.iter().all(|x| x.is_finite())).collect();
        for q in problem.q.chunks(case.d) {
            let scores = keys.iter().map(|k| dot(q, k).abs() * f64::from(problem.scale));
            largest = scores.fold(largest, f64::max);
        }
    }
    assert!(largest >= 6e4, "scores reach {largest}");
}

#[test]
fn moe_batches_and_crowds() {
    use moe::{Case, Crowd, Inputs, MoeUp};
    let grid = MoeUp::grid();
    for t in [1, 2, 7, 8, 9, 64, 513] {
        assert!(grid.iter().any(|c| c.t == t), "M = {t} is not in the grid");
    }
    for &crowd in Crowd::ALL {
        assert!(grid.iter().any(|c| c.crowd == crowd), "no case is {crowd}");
    }
    let case = Case { t: 513, e: 64, top_k: 4, crowd: Crowd::Skewed, ..grid[0].clone() };
    let ids = Inputs::generate(&case, 1).ids;
    let mut counts: Vec<usize> = (0..64).map(|e| ids.iter().filter(|&&id| id == e).count()).collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    assert!(counts[..8].iter().sum::<usize>() * 2 > ids.len(), "the busiest eighth takes less than half: {counts:?}");
    assert!(ids.chunks(4).all(|c| (0..4).all(|i| !c[..i].contains(&c[i]))), "an expert twice in a token");
}
