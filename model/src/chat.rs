//! Chat templates: a conversation as the text that a model was trained to read.
//!
//! Templates are Jinja, as in `tokenizer.chat_template` of a GGUF file or `chat_template.jinja` of a Hugging Face
//! folder, and are rendered as transformers' `apply_chat_template` does: `trim_blocks`, `lstrip_blocks`, loop controls,
//! Python's methods, `raise_exception`, `strftime_now`, a `tojson` that writes what `json.dumps` writes, and
//! `{% generation %}`, which changes no text.
//!
//! transformers then turns the text of a control token into that token wherever it stands, so that a user who types
//! `<|im_end|>` ends the turn. Here only the template may do that: the text of a control token inside the content of a
//! message stays text ([`Template::prompt`]). What a model was trained on looks the same either way.

use crate::error::Error;
use crate::tokenizer::Tokenizer;
use jiff::{civil::DateTime, fmt::strtime, Zoned};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// The template that Qwen's and many other models share, without tools.
pub const CHATML: &str = "\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

/// Instructions that a template may run, and bytes it may be or write: real ones need some thousands and some 100 KB.
const FUEL: u64 = 10_000_000;
const MOST_SOURCE: usize = 1 << 20;
const MOST_TEXT: usize = 64 << 20;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else a template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// What a template gets beside messages, under the names that templates use: `tools`, `bos_token`, `enable_thinking`, ...
/// Keys of objects keep their order.
#[derive(Debug, Clone, Default)]
pub struct Extra(Vec<(String, Value)>);

impl Extra {
    /// Sets a text.
    pub fn text(&mut self, name: &str, text: &str) {
        self.0.push((name.into(), text.into()));
    }

    /// Sets a value, given as JSON.
    pub fn json(&mut self, name: &str, json: &str) -> Result<(), Error> {
        self.0.push((name.into(), parse(json)?));
        Ok(())
    }

    /// Sets every member of a JSON object.
    pub fn object(&mut self, json: &str) -> Result<(), Error> {
        let object = parse(json)?;
        if object.kind() != ValueKind::Map {
            return Err(Error::argument("template values", "are no JSON object"));
        }
        for key in object.try_iter().map_err(failed)? {
            let value = object.get_item(&key).map_err(failed)?;
            self.0.push((key.to_string(), value));
        }
        Ok(())
    }
}

fn parse(json: &str) -> Result<Value, Error> {
    serde_json::from_str(json).map_err(|e| Error::argument("template values", format!("are not JSON: {e}")))
}

/// A conversation as a model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// What the template wrote.
    pub text: String,
    /// Where in it the content of a message has the text of a control token: ascending byte offsets.
    pub shielded: Vec<usize>,
}

impl Prompt {
    /// Token ids of the text from byte `from` on: the template's control tokens are tokens, those in messages are text.
    pub fn encode_from(&self, tokenizer: &Tokenizer, from: usize) -> Result<Vec<u32>, Error> {
        let text = self.text.get(from..).ok_or_else(|| Error::argument("from", "is inside a character"))?;
        let shielded: Vec<usize> = self.shielded.iter().filter_map(|at| at.checked_sub(from)).collect();
        tokenizer.encode_shielded(text, &shielded)
    }

    /// Token ids.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
        self.encode_from(tokenizer, 0)
    }
}

/// A chat template.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    source: String,
}

const NAME: &str = "chat template";

impl Template {
    /// Parses a template.
    pub fn new(source: &str) -> Result<Template, Error> {
        Template::with_clock(source, None)
    }

    /// As [`Template::new`], with a fixed time for `strftime_now`, such as `2026-07-04T05:06:07`.
    pub fn at(source: &str, time: &str) -> Result<Template, Error> {
        let time = time.parse().map_err(|e| Error::argument("time", one_line(&format!("{e}"))))?;
        Template::with_clock(source, Some(time))
    }

    fn with_clock(source: &str, time: Option<DateTime>) -> Result<Template, Error> {
        if source.len() > MOST_SOURCE {
            return Err(Error::argument(NAME, format!("has {} bytes, expected at most {MOST_SOURCE}", source.len())));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", move |format: String| {
            let text = match time {
                Some(time) => strtime::format(&format, time),
                None => strtime::format(&format, &Zoned::now()),
            };
            text.map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        environment.add_template_owned(NAME, without_generation(source)).map_err(failed)?;
        Ok(Template { environment, source: source.into() })
    }

    /// The text for messages given as a JSON list, with whatever members a template reads.
    pub fn render(&self, messages: &str, extra: &Extra, answer_next: bool) -> Result<String, Error> {
        let messages = parse(messages)?;
        // transformers always passes these two, as none where there are none.
        let fixed = ["tools", "documents"].map(|name| (name.to_string(), Value::from(())));
        let last =
            [("messages".to_string(), messages), ("add_generation_prompt".to_string(), Value::from(answer_next))];
        let context = Value::from_pairs(fixed.into_iter().chain(extra.0.iter().cloned()).chain(last));
        let text = self.environment.get_template(NAME).and_then(|t| t.render(context)).map_err(failed)?;
        if text.len() > MOST_TEXT {
            return Err(Error::argument(NAME, format!("writes {} bytes, expected at most {MOST_TEXT}", text.len())));
        }
        Ok(text)
    }

    /// The text of a conversation; with `answer_next` it ends where the model's answer begins. Control tokens of
    /// `tokenizer` that stand in messages are marked as text.
    ///
    /// The first character of each is a placeholder while the template runs, so that templates may cut and trim
    /// messages as they like.
    pub fn prompt(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        extra: &Extra,
        answer_next: bool,
    ) -> Result<Prompt, Error> {
        let used = |c: char| {
            self.source.contains(c)
                || messages.iter().any(|m| m.role.contains(c) || m.content.contains(c))
                || extra.0.iter().any(|(_, value)| value.to_string().contains(c))
        };
        // Unicode's noncharacters, which no text should hold.
        let mut free = ('\u{fdd0}'..='\u{fdef}').filter(|&c| !used(c));
        let mut placeholders: HashMap<char, char> = HashMap::new();
        let mut shielded = Vec::with_capacity(messages.len());
        for message in messages {
            let (mut content, mut end) = (String::with_capacity(message.content.len()), 0);
            for at in tokenizer.control_texts(&message.content) {
                let Some(first) = message.content.get(at..).and_then(|rest| rest.chars().next()) else { continue };
                let placeholder = match placeholders.get(&first) {
                    Some(&c) => c,
                    None => {
                        let c = free.next().ok_or_else(|| {
                            Error::argument("messages", "hold every placeholder that control tokens in them would need")
                        })?;
                        placeholders.insert(first, c);
                        c
                    }
                };
                content.push_str(message.content.get(end..at).unwrap_or_default());
                content.push(placeholder);
                end = at + first.len_utf8();
            }
            content.push_str(message.content.get(end..).unwrap_or_default());
            shielded.push(Message { role: message.role.clone(), content });
        }
        let json = serde_json::to_string(&shielded).map_err(|e| Error::argument("messages", e.to_string()))?;
        let text = self.render(&json, extra, answer_next)?;
        if placeholders.is_empty() {
            return Ok(Prompt { text, shielded: Vec::new() });
        }
        let originals: HashMap<char, char> = placeholders.into_iter().map(|(first, c)| (c, first)).collect();
        let mut prompt = Prompt { text: String::with_capacity(text.len()), shielded: Vec::new() };
        for c in text.chars() {
            if originals.contains_key(&c) {
                prompt.shielded.push(prompt.text.len());
            }
            prompt.text.push(*originals.get(&c).unwrap_or(&c));
        }
        Ok(prompt)
    }
}

fn failed(e: minijinja::Error) -> Error {
    Error::argument(NAME, one_line(&e.to_string()))
}

fn one_line(text: &str) -> String {
    const MOST: usize = 300;
    let mut line: String = text.chars().take(MOST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(MOST).is_some() {
        line.push_str("...");
    }
    line
}

/// The template with `{% generation %}` as a condition that holds: the tag marks what the assistant said and writes
/// nothing.
fn without_generation(source: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = tag.trim_start_matches("{%").trim_start_matches(['-', '+']);
        let inner = inner.trim_end_matches("%}").trim_end_matches(['-', '+']).trim();
        match inner {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// transformers' `tojson`: `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: &Value, ensure_ascii: Option<bool>, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent = options.get::<Option<Value>>("indent")?.filter(|v| !v.is_none());
    let indent = match indent {
        None => None,
        Some(v) if v.is_integer() => Some(" ".repeat(i64::try_from(v)?.clamp(0, 64) as usize)),
        Some(v) => Some(v.to_string()),
    };
    let separators = options.get::<Option<Value>>("separators")?.filter(|v| !v.is_none());
    let (item, key) = match &separators {
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
        None => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let ascii = ensure_ascii.or(options.get("ensure_ascii")?).unwrap_or(false);
    let style =
        JsonStyle { indent, item, key, ascii, sort: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false) };
    options.assert_all_used()?;
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(Value::from(out))
}

struct JsonStyle {
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
}

impl JsonStyle {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), minijinja::Error> {
        let refuse = |why: String| Err(minijinja::Error::new(ErrorKind::InvalidOperation, why));
        if depth > 100 {
            return refuse("tojson: is nested too deeply".into());
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => out.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item));
                self.items(out, ['[', ']'], items.collect(), depth)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    let name = match key.kind() {
                        ValueKind::String => key.to_string(),
                        ValueKind::None => "null".into(),
                        ValueKind::Bool => key.to_string().to_lowercase(),
                        ValueKind::Number if key.is_integer() => key.to_string(),
                        ValueKind::Number => python_float(f64::try_from(key.clone())?),
                        other => return refuse(format!("tojson: a key is of type {other}")),
                    };
                    items.push((Some(name), value.get_item(&key)?));
                }
                if self.sort {
                    items.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.items(out, ['{', '}'], items, depth)?;
            }
            other => return refuse(format!("tojson: a value of type {other} is no JSON")),
        }
        Ok(())
    }

    fn items(
        &self,
        out: &mut String,
        brackets: [char; 2],
        items: Vec<(Option<String>, Value)>,
        depth: usize,
    ) -> Result<(), minijinja::Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(brackets[0]);
        for (i, (key, item)) in items.iter().enumerate() {
            out.push_str(if i == 0 { "" } else { &self.item });
            line(out, depth + 1);
            if let Some(key) = key {
                self.string(out, key);
                out.push_str(&self.key);
            }
            self.write(out, item, depth + 1)?;
        }
        if !items.is_empty() {
            line(out, depth);
        }
        out.push(brackets[1]);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ascii && !(' '..='~').contains(&c)) => {
                    c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// As Python's `json` writes a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let text = format!("{x:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = x.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_pythons() {
        for (x, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1e100, "1e+100"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn templates_without_end_stop_and_errors_are_one_line() {
        let refused = |source: &str| {
            let text = match Template::new(source) {
                Ok(template) => template.render("[]", &Extra::default(), true).unwrap_err().to_string(),
                Err(e) => e.to_string(),
            };
            assert!(!text.contains('\n') && text.starts_with("chat template: ") && text.len() < 400, "{text}");
            text
        };
        assert!(
            refused("{% for a in range(10000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}").contains("fuel")
        );
        assert!(refused("{{ raise_exception('roles\nmust alternate') }}").contains("roles must alternate"));
        refused("{% if %}");
        refused("{{ messages[0].content.strip() }}");
        refused("{{ nothing | tojson }}");
        refused("{% include 'other' %}");
        refused(&"x".repeat(MOST_SOURCE + 1));
        assert!(Extra::default().object("[1]").is_err());
        assert!(Extra::default().json("tools", "{").is_err());
        assert!(Template::at("", "yesterday").is_err());
    }
}
