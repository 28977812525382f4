//! The JSON of llama-bench and its kin, with whatever a program printed around and between it.

use serde_json::Value;

/// One result.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Tokens of the prompt.
    pub n_prompt: u64,
    /// Tokens generated.
    pub n_gen: u64,
    /// Tokens a second of every repetition; the mean alone where there are none.
    pub samples: Vec<f64>,
    /// The whole object.
    pub fields: Value,
}

/// The results in a program's output. Looked for: an array of results anywhere in the text; the same once lines are left
/// out that cannot be part of it; results that stand in lines of their own (`-o jsonl`). `Err`: there are none.
pub fn parse(output: &str) -> Result<Vec<Row>, String> {
    // A progress line that rewrites itself ends in a carriage return.
    let text = output.replace('\r', "\n");
    let kept: Vec<&str> = text.lines().filter(|l| may_be_json(l)).collect();
    let kept = kept.join("\n");
    let found = array(&text).or_else(|| array(&kept)).or_else(|| lines(&text)).or_else(|| array(&without_nan(&kept)));
    found.ok_or_else(|| match text.trim().is_empty() {
        true => "it printed nothing".into(),
        false => "no results of llama-bench in its output".into(),
    })
}

/// Lines of a printed array begin with a bracket, a name in quotes or a number; a log line may too, in brackets.
fn may_be_json(line: &str) -> bool {
    let line = line.trim();
    let Some(first) = line.chars().next() else { return false };
    match first {
        '{' | '}' | ']' => true,
        '[' => line.len() == 1 || line[1..].trim_start().starts_with(['{', ']']),
        '"' => line.contains("\":"),
        _ => line.trim_end_matches(',').parse::<f64>().is_ok(),
    }
}

/// `nan` and `inf`, which C prints and JSON lacks, as null.
fn without_nan(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let value = line.rsplit_once(':').map(|(_, v)| v.trim().trim_end_matches(','));
        match value.filter(|v| matches!(v.trim_start_matches('-'), "nan" | "inf" | "NaN" | "Infinity")) {
            Some(value) => out += &line.replace(value, "null"),
            None => out += line,
        }
        out.push('\n');
    }
    out
}

/// The first array in the text whose entries are results, one at least.
fn array(text: &str) -> Option<Vec<Row>> {
    text.match_indices('[').find_map(|(at, _)| {
        let mut values = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Vec<Value>>();
        let list = values.next()?.ok()?;
        let rows: Option<Vec<Row>> = list.into_iter().map(row).collect();
        rows.filter(|rows| !rows.is_empty())
    })
}

fn lines(text: &str) -> Option<Vec<Row>> {
    let rows: Vec<Row> = text.lines().filter_map(|l| row(serde_json::from_str(l.trim()).ok()?)).collect();
    Some(rows).filter(|rows| !rows.is_empty())
}

fn row(fields: Value) -> Option<Row> {
    let number = |key: &str| fields.get(key)?.as_u64();
    let (n_prompt, n_gen) = (number("n_prompt")?, number("n_gen")?);
    let mean = fields.get("avg_ts")?.as_f64().filter(|&v| v > 0.0)?;
    let samples = fields.get("samples_ts").and_then(Value::as_array);
    let samples: Vec<f64> = samples.into_iter().flatten().filter_map(Value::as_f64).filter(|&v| v > 0.0).collect();
    let samples = if samples.is_empty() { vec![mean] } else { samples };
    Some(Row { n_prompt, n_gen, samples, fields })
}

#[cfg(test)]
mod tests {
    use super::parse;

    const TWO: &str = "[\n  {\n    \"build_commit\": \"abc\",\n    \"n_prompt\": 512,\n    \"n_gen\": 0,\n    \"avg_ts\": 10.5,\n    \
                       \"stddev_ts\": 0.5,\n    \"samples_ts\": [ 10, 11 ]\n  },\n  {\n    \"n_prompt\": 0,\n    \
                       \"n_gen\": 128,\n    \"avg_ts\": 3.0\n  }\n]\n";

    fn is_two(output: &str) {
        let rows = parse(output).unwrap_or_else(|e| panic!("{e}:\n{output}"));
        let got: Vec<_> = rows.iter().map(|r| (r.n_prompt, r.n_gen, r.samples.clone())).collect();
        assert_eq!(got, [(512, 0, vec![10.0, 11.0]), (0, 128, vec![3.0])], "{output}");
    }

    #[test]
    fn log_lines_around_the_array() {
        is_two(TWO);
        is_two(&format!("ggml_init: found 1 device\n[INFO] loading [1, 2]\nload: done. {TWO}~free: [ok]\n"));
        is_two(&format!("[]\n[{{\"level\": \"info\"}}]\n{{\"n_prompt\": 1}}\n{TWO}[1, 2, 3]"));
        is_two(&format!("\u{1b}[32mstart\u{1b}[0m\r10 %\r100 %\r{}", TWO.replace('\n', "\r\n")));
        is_two(&format!("unclosed [ {{ \"x\n{TWO}"));
    }

    #[test]
    fn log_lines_inside_the_array() {
        let between = TWO.replace("  },\n", "  },\nllama_perf: done\n[WARN] slow: 3 [x]\n# note\nwarning: {brace}\n");
        is_two(&between);
        is_two(&TWO.replace("\"n_gen\": 0,\n", "\"n_gen\": 0,\nrepack: tensor 3 of 9\n\u{1b}[33mhot\u{1b}[0m\n"));
        is_two(&TWO.replace(": 0.5,", ": -nan,"));
    }

    #[test]
    fn one_result_a_line() {
        let lines = "log\n{\"n_prompt\": 512, \"n_gen\": 0, \"avg_ts\": 10.5, \"samples_ts\": [10, 11]}\nmore {log}\n\
                     {\"n_prompt\": 0, \"n_gen\": 128, \"avg_ts\": 3.0}\n";
        is_two(lines);
    }

    #[test]
    fn no_results_are_an_error() {
        for output in
            ["", "  \n", "error: failed to load", "[]", "[1, 2]", "[{\"level\": \"info\"}]", &TWO[..150], "[[[[["]
        {
            assert!(parse(output).is_err(), "{output}");
        }
        // A speed of zero is none.
        assert!(parse(&TWO.replace("10.5", "0.0")).is_err());
    }
}
