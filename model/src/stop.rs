//! Stop strings in a text that comes in pieces.

use crate::error::Error;

/// Passes text through up to the first stop string, holding back what may still become one.
///
/// What passes does not depend on how the text is cut into pieces: the stop string that is complete first ends it, of
/// those complete at the same byte the longest.
#[derive(Debug, Clone, Default)]
pub struct Stops {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl Stops {
    /// Errors where a stop string is empty.
    pub fn new(stops: &[String]) -> Result<Stops, Error> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::argument("stop", "is empty, expected text"));
        }
        Ok(Stops { stops: stops.to_vec(), held: String::new(), stopped: false })
    }

    /// A stop string has come.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What of the text so far can be shown now.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|s| self.held.find(s.as_str()).map(|at| (at + s.len(), at)));
        if let Some((_, at)) = found.min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest.saturating_sub(1));
        let begins =
            |at: &usize| self.held.get(*at..).is_some_and(|rest| self.stops.iter().any(|stop| stop.starts_with(rest)));
        let keep = (first..self.held.len()).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// What was held back, when no more text comes.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[String], pieces: &[String]) -> (String, bool) {
        let mut held = Stops::new(stops).unwrap();
        let mut text: String = pieces.iter().map(|p| held.push(p)).collect();
        let stopped = held.stopped();
        text.push_str(&held.finish());
        (text, stopped)
    }

    #[test]
    fn text_is_held_only_while_it_may_become_a_stop() {
        let mut held = Stops::new(&["\nUser:".into(), "é!".into()]).unwrap();
        assert_eq!(held.push("a\nUs"), "a");
        assert_eq!(held.push("ual\n"), "\nUsual");
        assert_eq!(held.push("\nUser"), "\n");
        assert!(!held.stopped());
        assert_eq!(held.push(": b"), "");
        assert!(held.stopped());
        assert_eq!(held.push("more"), "");
        assert!(Stops::new(&[String::new()]).is_err());
        assert_eq!(run(&["xé!".into()], &["xé".into()]), ("xé".into(), false));
    }

    proptest! {
        /// The naive way: after every character, does what has come end in a stop string?
        #[test]
        fn pieces_do_not_matter(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,5}", 0..8),
        ) {
            let whole = pieces.concat();
            let (mut expected, mut stopped) = (String::new(), false);
            for c in whole.chars() {
                expected.push(c);
                if let Some(stop) = stops.iter().filter(|s| expected.ends_with(s.as_str())).max_by_key(|s| s.len()) {
                    expected.truncate(expected.len() - stop.len());
                    stopped = true;
                    break;
                }
            }
            prop_assert_eq!(run(&stops, &pieces), (expected.clone(), stopped));
            prop_assert_eq!(run(&stops, &[whole]), (expected, stopped));
        }
    }
}
