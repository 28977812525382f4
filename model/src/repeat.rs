//! A deeper model out of a file's layers: to measure what many layers cost on the weights of a few.

use crate::config::MAX_LAYERS;
use crate::error::Error;
use crate::source::Loaded;

impl Loaded {
    /// Makes this a model of `layers` layers: layer l is a copy of the file's layer l modulo theirs. The weights in the CPU's
    /// memory are shared, those on a device are not; the text is noise. Errors: a number that is no multiple of the
    /// file's layers, or layers that do not end with a whole period of their kinds.
    pub fn repeat_layers(&mut self, layers: usize) -> Result<(), Error> {
        let own = self.config.layers.len();
        let kinds: Vec<_> = self.config.layers.iter().zip(&self.config.mlp).collect();
        let repeats = |period: &usize| (0..own).all(|i| kinds[i] == kinds[i % period]);
        let period = (1..=own).find(repeats).unwrap_or(own);
        let refused = |why: String| Err(Error::argument("repeat_layers", format!("is {layers}, {why}")));
        if own % period != 0 {
            return refused(format!("the file's {own} layers end within their pattern of {period}"));
        }
        if layers == 0 || layers % own != 0 || layers > MAX_LAYERS {
            return refused(format!("expected a multiple of the file's {own} layers, at most {MAX_LAYERS}"));
        }
        let times = layers / own;
        self.config.layers = self.config.layers.repeat(times);
        self.config.mlp = self.config.mlp.repeat(times);
        let once = std::mem::take(&mut self.weights.layers);
        self.weights.layers = once.iter().cycle().take(times * own).cloned().collect();
        // A tensor of a layer has the layer's number in its name: `blk.3.`, `model.layers.3.`.
        let of_layer = |name: &str| name.split('.').any(|part| part.parse::<usize>().is_ok_and(|n| n < own));
        let once = self.metadata.tensors.iter().filter(|t| t.used && of_layer(&t.name)).cloned().collect::<Vec<_>>();
        for _ in 1..times {
            self.metadata.tensors.extend_from_slice(&once);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::config::LayerKind::{Attention, Delta};

    #[test]
    fn layers_repeat_whole_patterns_only() {
        let load = || crate::embedded::load().unwrap();
        let (once, mut model) = (load(), load());
        let own = once.config.layers.len();
        model.repeat_layers(3 * own).unwrap();
        assert_eq!(model.weights.layers.len(), 3 * own);
        assert_eq!(model.config.count(Delta), 3 * once.config.count(Delta));
        model.config.validate().unwrap();
        let outside = |m: &crate::Loaded| m.metadata.tensors.iter().filter(|t| !t.name.starts_with("blk.")).count();
        let inside = |m: &crate::Loaded| m.metadata.tensors.iter().filter(|t| t.name.starts_with("blk.")).count();
        assert_eq!((outside(&model), inside(&model)), (outside(&once), 3 * inside(&once)));
        for n in [0, own - 1, own + 1, 1 << 20] {
            let why = load().repeat_layers(n).unwrap_err().to_string();
            assert!(why.starts_with(&format!("repeat_layers: is {n}, ")), "{why}");
        }
        let mut odd = load();
        odd.config.layers = vec![Delta, Delta, Attention, Delta];
        assert!(odd.repeat_layers(8).unwrap_err().to_string().contains("pattern of 3"));
    }
}
