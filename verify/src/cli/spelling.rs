//! llama.cpp's spellings: flags of several letters behind one dash, which clap does not know.

use std::ffi::OsString;

/// (llama.cpp's, ours)
const SPELLINGS: &[(&str, &str)] = &[
    ("-ub", "--ubatch"),
    ("-ngl", "--gpu-layers"),
    ("--ngl", "--gpu-layers"),
    ("-fa", "--flash-attn"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-mmp", "--mmap"),
    ("-rtr", "--run-time-repack"),
    ("-pg", "--prompt-gen"),
    ("-ncmoe", "--n-cpu-moe"),
    ("--batch-size", "--batch"),
    ("--ubatch-size", "--ubatch"),
    ("--ctx-size", "--ctx"),
    ("--n-predict", "--predict"),
    ("--n-gpu-layers", "--gpu-layers"),
];

/// The arguments with every spelling of llama.cpp replaced by ours, up to a bare `--`.
pub fn normalise(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut literal = false;
    args.map(|arg| {
        literal |= arg == "--";
        let Some(text) = arg.to_str().filter(|_| !literal) else { return arg };
        let (flag, value) = match text.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (text, None),
        };
        match SPELLINGS.iter().find(|(theirs, _)| *theirs == flag) {
            Some((_, ours)) => value.map_or(ours.to_string(), |v| format!("{ours}={v}")).into(),
            None => arg,
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::{normalise, OsString};

    #[test]
    fn both_spellings_reach_the_same_flag() {
        let args = ["q", "logits", "-ub", "64", "-b=2", "-ngl=3", "--", "-ub"].map(OsString::from);
        assert_eq!(
            normalise(args.into_iter()),
            ["q", "logits", "--ubatch", "64", "-b=2", "--gpu-layers=3", "--", "-ub"]
        );
    }
}
