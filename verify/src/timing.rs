//! Times several candidates in one interleaved run (A B C A B C ...), so that a drifting machine slows all of them alike.

use crate::compare::Failure;
use std::time::{Duration, Instant};

/// Times of one candidate.
#[derive(Debug, Clone, Copy)]
pub struct Time {
    /// Median seconds a call.
    pub median: f64,
    /// Fastest sample, seconds a call.
    pub min: f64,
    /// Samples.
    pub samples: usize,
}

/// What one candidate may take in all, roughly: slow ones get fewer samples.
const MOST: f64 = 5.0;

/// Runs every candidate in turn, `samples` times; a sample repeats a short call until it takes `least`. A candidate whose
/// samples would take several seconds gets fewer. `call(i)` runs candidate i once.
pub fn interleaved(
    candidates: usize,
    samples: usize,
    least: Duration,
    mut call: impl FnMut(usize) -> Result<(), Failure>,
) -> Result<Vec<Time>, Failure> {
    let mut plan = Vec::new();
    for i in 0..candidates {
        // Warm up, then see how many calls fill a sample. A slow call needs no second one to warm up.
        let mut once = f64::INFINITY;
        for _ in 0..2 {
            let begin = Instant::now();
            call(i)?;
            once = begin.elapsed().as_secs_f64().max(1e-9);
            if once > MOST / 10.0 {
                break;
            }
        }
        let repeats = (least.as_secs_f64() / once).ceil().clamp(1.0, 1e6);
        let own = (MOST / (repeats * once)).clamp(1.0, samples.max(1) as f64);
        plan.push((repeats as usize, own as usize));
    }
    let mut times = vec![Vec::new(); candidates];
    for sample in 0..samples.max(1) {
        for (i, &(repeats, _)) in plan.iter().enumerate().filter(|(_, (_, own))| sample < *own) {
            let begin = Instant::now();
            for _ in 0..repeats {
                call(i)?;
            }
            times[i].push(begin.elapsed().as_secs_f64() / repeats as f64);
        }
    }
    Ok(times
        .into_iter()
        .map(|mut t| {
            t.sort_by(f64::total_cmp);
            Time { median: t[t.len() / 2], min: t[0], samples: t.len() }
        })
        .collect())
}
