//! What can be drawn, on made-up distributions, and how often it is.

use proptest::prelude::*;
use qwen3next_model::generate::{Sampler, Sampling};

const ALL: Sampling =
    Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0, repeat_last_n: 64, seed: 5 };

fn distribution(sampling: Sampling, logits: &[f32]) -> Vec<(u32, f64)> {
    Sampler::new(sampling).unwrap().distribution(logits).unwrap()
}

/// Probabilities of all tokens, computed apart: most likely first, lower ids first among equals.
fn softmax(logits: &[f32]) -> Vec<(u32, f64)> {
    let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // In f64: two logits a unit apart may lie equally far from the peak in f32.
    let exp: Vec<f64> = logits.iter().map(|&l| (f64::from(l) - f64::from(peak)).exp()).collect();
    let total: f64 = exp.iter().sum();
    let mut all: Vec<(u32, f64)> = exp.iter().enumerate().map(|(i, e)| (i as u32, e / total)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![
        prop::collection::vec(-20.0f32..20.0, 1..60),
        // Ties and tokens that cannot come.
        prop::collection::vec(prop_oneof![Just(f32::NEG_INFINITY), Just(0.0), Just(1.0), Just(2.0)], 0..40).prop_map(
            |mut l| {
                l.push(0.5);
                l
            }
        ),
    ]
}

proptest! {
    #[test]
    fn without_filters_it_is_the_softmax(logits in logits()) {
        let (got, want) = (distribution(ALL, &logits), softmax(&logits));
        prop_assert_eq!(got.len(), want.len());
        for ((id, p), (want_id, want_p)) in got.iter().zip(&want) {
            prop_assert_eq!(id, want_id);
            prop_assert!((p - want_p).abs() < 1e-6, "{} {}", p, want_p);
        }
    }

    #[test]
    fn top_k_keeps_the_k_most_likely(logits in logits(), k in 1usize..70) {
        let kept: Vec<u32> = distribution(Sampling { top_k: k, ..ALL }, &logits).iter().map(|(id, _)| *id).collect();
        let want: Vec<u32> = softmax(&logits).iter().take(k).map(|(id, _)| *id).collect();
        prop_assert_eq!(kept, want);
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_p(logits in logits(), p in 0.01f32..1.0) {
        let kept = distribution(Sampling { top_p: p, ..ALL }, &logits);
        let all = softmax(&logits);
        let sum = |n: usize| all.iter().take(n).map(|(_, p)| p).sum::<f64>();
        prop_assert!(sum(kept.len()) >= f64::from(p) - 1e-6);
        prop_assert!(sum(kept.len() - 1) < f64::from(p) + 1e-6, "one less reaches it too");
        for ((id, q), (want, of)) in kept.iter().zip(&all) {
            prop_assert_eq!(id, want);
            prop_assert!((q - of / sum(kept.len())).abs() < 1e-6);
        }
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely(logits in logits(), p in 0.0f32..1.0) {
        let kept = distribution(Sampling { min_p: p, ..ALL }, &logits);
        let all = softmax(&logits);
        let least = f64::from(p) * all[0].1;
        for (i, (id, q)) in all.iter().enumerate() {
            if (q - least).abs() > 1e-6 * all[0].1 {
                prop_assert_eq!(kept.get(i).map(|(kept, _)| kept) == Some(id), *q > least, "{} of {}", i, kept.len());
            }
        }
    }

    #[test]
    fn temperature_sharpens_and_flattens_and_keeps_the_order(logits in logits(), t in 0.05f32..5.0) {
        let got = distribution(Sampling { temperature: t, ..ALL }, &logits);
        let scaled: Vec<f32> = logits.iter().map(|l| l / t).collect();
        let want = softmax(&scaled);
        for (id, p) in &got {
            let (_, want) = want.iter().find(|(other, _)| other == id).unwrap();
            prop_assert!((p - want).abs() < 1e-4, "{} {}", p, want);
        }
        prop_assert!(got.windows(2).all(|w| w[0].1 >= w[1].1));
        let greedy = distribution(Sampling { temperature: 0.0, ..ALL }, &logits);
        prop_assert_eq!(greedy, vec![(got[0].0, 1.0)]);
    }

    #[test]
    fn filters_act_in_their_order(logits in logits(), k in 1usize..20, p in 0.05f32..1.0, m in 0.0f32..1.0, t in 0.1f32..3.0) {
        // Each on what the one before left, as probabilities: top-k, top-p, min-p; the temperature changes no set.
        let mut left = softmax(&logits);
        let total = |left: &[(u32, f64)]| left.iter().map(|(_, p)| p).sum::<f64>();
        left.truncate(k);
        let (whole, mut sum) = (total(&left), 0.0);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-6;
        let mut close = false;
        let enough = left.iter().position(|(_, q)| {
            sum += q / whole;
            close |= near(sum, p.into());
            sum >= f64::from(p)
        });
        left.truncate(enough.map_or(left.len(), |i| i + 1));
        let best = left[0].1;
        close |= left.iter().any(|(_, q)| near(q / best, m.into()));
        left.retain(|(_, q)| q / best >= f64::from(m));
        let sampling = Sampling { temperature: t, top_k: k, top_p: p, min_p: m, ..ALL };
        let got: Vec<u32> = distribution(sampling, &logits).iter().map(|(id, _)| *id).collect();
        if !close {
            prop_assert_eq!(got, left.iter().map(|(id, _)| *id).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_penalty_touches_recent_tokens_alone(
        logits in prop::collection::vec(-5.0f32..5.0, 8..20),
        tokens in prop::collection::vec(0u32..8, 0..12),
        n in 1usize..6,
        penalty in 1.01f32..2.0,
    ) {
        let mut sampler = Sampler::new(Sampling { repeat_penalty: penalty, repeat_last_n: n, ..ALL }).unwrap();
        tokens.iter().for_each(|&t| sampler.accept(t));
        let recent = &tokens[tokens.len().saturating_sub(n)..];
        let mut changed = logits.clone();
        for (id, l) in changed.iter_mut().enumerate() {
            if recent.contains(&(id as u32)) {
                *l = if *l > 0.0 { *l / penalty } else { *l * penalty };
            }
        }
        prop_assert_eq!(sampler.distribution(&logits).unwrap(), distribution(ALL, &changed));
    }
}

#[test]
fn draws_follow_the_distribution() {
    const DRAWS: usize = 40_000;
    let logits: Vec<f32> = (0..24).map(|i| ((i * 37 % 23) as f32) * 0.15).collect();
    for sampling in [
        ALL,
        Sampling { temperature: 0.7, ..ALL },
        Sampling { temperature: 1.6, top_k: 12, ..ALL },
        Sampling { top_p: 0.8, min_p: 0.1, ..ALL },
    ] {
        let expected = distribution(sampling, &logits);
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut counts = vec![0usize; logits.len()];
        for _ in 0..DRAWS {
            counts[sampler.sample(&logits).unwrap() as usize] += 1;
        }
        let kept: usize = expected.iter().map(|(id, _)| counts[*id as usize]).sum();
        assert_eq!(kept, DRAWS, "a token was drawn that the filters left out");
        let chi: f64 = expected
            .iter()
            .map(|(id, p)| (counts[*id as usize] as f64 - p * DRAWS as f64).powi(2) / (p * DRAWS as f64))
            .sum();
        // Mean and variance of chi-square are k and 2k: five deviations are 1 in some 10^5 for a fair sampler, and the
        // seed is fixed.
        let k = (expected.len() - 1) as f64;
        println!("chi-square {chi:.1} at {k} degrees of freedom");
        assert!((chi - k).abs() < 5.0 * (2.0 * k).sqrt(), "{chi} at {k} degrees of freedom");
    }
}

#[test]
fn seeds_differ_and_values_outside_their_range_are_refused() {
    let logits = vec![0.0f32; 1000];
    let draws = |seed| {
        let mut sampler = Sampler::new(Sampling { seed, ..ALL }).unwrap();
        (0..20).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
    for bad in [
        Sampling { temperature: -1.0, ..ALL },
        Sampling { temperature: f32::INFINITY, ..ALL },
        Sampling { top_p: 0.0, ..ALL },
        Sampling { min_p: 1.5, ..ALL },
        Sampling { repeat_penalty: 0.0, ..ALL },
        Sampling { repeat_penalty: f32::NAN, ..ALL },
    ] {
        assert!(Sampler::new(bad).is_err(), "{bad:?}");
    }
}
