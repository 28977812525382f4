//! Choosing the next token from logits.

use crate::error::Error;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::VecDeque;

/// How tokens are drawn. The filters apply in this order, llama.cpp's: repeat penalty, top-k, top-p, min-p, then the
/// temperature.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps this many most likely tokens; 0: all.
    pub top_k: usize,
    /// Keeps the fewest most likely tokens whose probabilities reach this sum; 1: all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the most likely one; 0: all.
    pub min_p: f32,
    /// Logits of tokens that came lately are divided by this where positive, multiplied where negative; 1: none.
    pub repeat_penalty: f32,
    /// How many tokens back the penalty looks; 0: none.
    pub repeat_last_n: usize,
    /// Equal seeds give equal texts.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 1,
        }
    }
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }
}

/// Draws tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    /// The last tokens, as far as the penalty looks.
    recent: VecDeque<u32>,
}

impl Sampler {
    /// Errors where a value is outside its range.
    pub fn new(sampling: Sampling) -> Result<Sampler, Error> {
        let s = &sampling;
        if !(s.temperature >= 0.0 && s.temperature.is_finite()) {
            return Err(Error::argument("temperature", format!("is {}, expected 0 or more", s.temperature)));
        }
        if !(s.top_p > 0.0 && s.top_p <= 1.0) {
            return Err(Error::argument("top_p", format!("is {}, expected above 0 and at most 1", s.top_p)));
        }
        if !(0.0..=1.0).contains(&s.min_p) {
            return Err(Error::argument("min_p", format!("is {}, expected 0 to 1", s.min_p)));
        }
        if !(s.repeat_penalty > 0.0 && s.repeat_penalty.is_finite()) {
            return Err(Error::argument("repeat_penalty", format!("is {}, expected above 0", s.repeat_penalty)));
        }
        Ok(Sampler { sampling, rng: ChaCha8Rng::seed_from_u64(sampling.seed), recent: VecDeque::new() })
    }

    /// Remembers a token that was read, for the penalty. Drawn ones are remembered anyway.
    pub fn accept(&mut self, token: u32) {
        if self.sampling.repeat_penalty == 1.0 || self.sampling.repeat_last_n == 0 {
            return;
        }
        if self.recent.len() >= self.sampling.repeat_last_n {
            self.recent.pop_front();
        }
        self.recent.push_back(token);
    }

    /// Draws a token. Errors where a logit is NaN, or none is above -inf.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, Error> {
        let candidates = self.candidates(logits)?;
        let token = match candidates.as_slice() {
            [(only, _)] => *only,
            many => {
                let mut left = self.rng.random::<f64>() * many.iter().map(|(_, w)| w).sum::<f64>();
                let found = many.iter().find(|(_, w)| {
                    left -= w;
                    left < 0.0
                });
                found.or(many.last()).map_or(0, |(id, _)| *id)
            }
        };
        self.accept(token);
        Ok(token)
    }

    /// The tokens that can be drawn next and their probabilities, the most likely first.
    pub fn distribution(&self, logits: &[f32]) -> Result<Vec<(u32, f64)>, Error> {
        let mut candidates = self.candidates(logits)?;
        let total: f64 = candidates.iter().map(|(_, w)| w).sum();
        candidates.iter_mut().for_each(|(_, w)| *w /= total);
        Ok(candidates)
    }

    /// At least one token; weights that need not add up to 1, that of the most likely first.
    fn candidates(&self, logits: &[f32]) -> Result<Vec<(u32, f64)>, Error> {
        if let Some(token) = logits.iter().position(|l| l.is_nan()) {
            return Err(Error::argument("logits", format!("that of token {token} is NaN")));
        }
        let penalised = self.penalised(logits);
        let logits = penalised.as_deref().unwrap_or(logits);
        // Ties go to the lower id, so that greedy decoding is a function of the logits alone.
        let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let best = *ids.iter().min_by(|a, b| order(a, b)).ok_or_else(|| Error::argument("logits", "are empty"))?;
        let peak = f64::from(logits[best as usize]);
        if peak == f64::NEG_INFINITY {
            return Err(Error::argument("logits", "are all -inf"));
        }
        if self.sampling.temperature == 0.0 || peak == f64::INFINITY {
            return Ok(vec![(best, 1.0)]);
        }

        if (1..ids.len()).contains(&self.sampling.top_k) {
            ids.select_nth_unstable_by(self.sampling.top_k - 1, order);
            ids.truncate(self.sampling.top_k);
        }
        ids.sort_unstable_by(order);
        let weight = |id: &u32, t: f64| ((f64::from(logits[*id as usize]) - peak) / t).exp();
        // At 1 no rounding of the sum may leave out what is least likely.
        if self.sampling.top_p < 1.0 {
            let total: f64 = ids.iter().map(|id| weight(id, 1.0)).sum();
            let mut sum = 0.0;
            let enough = ids.iter().position(|id| {
                sum += weight(id, 1.0);
                sum >= f64::from(self.sampling.top_p) * total
            });
            ids.truncate(enough.map_or(ids.len(), |i| i + 1));
        }
        let least = f64::from(self.sampling.min_p);
        ids.truncate(ids.iter().position(|id| weight(id, 1.0) < least).unwrap_or(ids.len()).max(1));

        let t = f64::from(self.sampling.temperature);
        Ok(ids.iter().map(|id| (*id, weight(id, t))).collect())
    }

    /// The logits with the penalty; `None` where it changes nothing.
    fn penalised(&self, logits: &[f32]) -> Option<Vec<f32>> {
        if self.recent.is_empty() {
            return None;
        }
        let mut new = logits.to_vec();
        for &token in &self.recent {
            // From the old value: a token that came twice is penalised once.
            if let (Some(to), Some(&old)) = (new.get_mut(token as usize), logits.get(token as usize)) {
                *to = if old > 0.0 { old / self.sampling.repeat_penalty } else { old * self.sampling.repeat_penalty };
            }
        }
        Some(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(sampling: Sampling, logits: &[f32]) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling).unwrap();
        (0..500).map(|_| sampler.sample(logits).unwrap()).collect()
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let all = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 3, ..Sampling::default() };
        let kinds = |s| {
            let mut d = draws(s, &logits);
            d.sort_unstable();
            d.dedup();
            d
        };
        assert_eq!(kinds(all), [0, 1, 2, 3]);
        assert_eq!(kinds(Sampling { top_k: 2, ..all }), [0, 1]);
        assert_eq!(kinds(Sampling { top_p: 0.7, ..all }), [0, 1]);
        assert_eq!(kinds(Sampling { min_p: 0.2, ..all }), [0, 1, 2]);
        assert_eq!(kinds(Sampling { temperature: 0.0, ..all }), [0]);
        let first = draws(all, &logits).iter().filter(|&&d| d == 0).count();
        assert!((200..300).contains(&first), "{first} of 500 draws at p = 0.5");
    }

    #[test]
    fn equal_seeds_equal_draws_and_bad_logits_are_named() {
        let logits = [0.1f32, 0.2, 0.3];
        assert_eq!(draws(Sampling::default(), &logits), draws(Sampling::default(), &logits));
        let mut greedy = Sampler::new(Sampling::greedy()).unwrap();
        assert_eq!(greedy.sample(&[1.0, 2.0, 2.0]).unwrap(), 1);
        assert!(greedy.sample(&[1.0, f32::NAN]).unwrap_err().to_string().contains("token 1"));
        assert!(greedy.sample(&[f32::NEG_INFINITY]).is_err());
        assert!(greedy.sample(&[]).is_err());
        assert!(Sampler::new(Sampling { top_p: f32::NAN, ..Sampling::default() }).is_err());
    }
}
