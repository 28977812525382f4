//! Reports of a verification: one JSON document, or one HTML page that needs nothing else.

use crate::compare::{Histogram, Metrics};
use crate::suite::{not_taken, Distribution, Options, Row, Verdict};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use qwen3next_kernels::Isa;
use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::fmt::{Display, Write};

/// Where and when the verification ran.
#[derive(Debug, Clone)]
pub struct Machine {
    /// CPU model, or the architecture where the system does not tell.
    pub cpu: String,
    /// Architecture.
    pub arch: &'static str,
    /// Operating system and version.
    pub os: String,
    /// Instruction sets that variants may use here.
    pub isas: Vec<&'static str>,
    /// Threads of the pool.
    pub threads: usize,
    /// Date and time, UTC, ISO 8601.
    pub date: String,
}

impl Machine {
    /// This machine, now.
    pub fn here() -> Machine {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Machine {
            cpu: cpu_model().unwrap_or_else(|| std::env::consts::ARCH.into()),
            arch: std::env::consts::ARCH,
            os: system(),
            isas: Isa::all().filter(|isa| isa.available()).map(Isa::name).collect(),
            threads: rayon::current_num_threads(),
            date: iso_date(now),
        }
    }
}

fn cpu_model() -> Option<String> {
    if cfg!(target_os = "macos") {
        let output = std::process::Command::new("sysctl").args(["-n", "machdep.cpu.brand_string"]).output().ok()?;
        return Some(String::from_utf8(output.stdout).ok()?.trim().to_string()).filter(|name| !name.is_empty());
    }
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name") || l.starts_with("Model"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

fn system() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).map(|n| n.trim_matches('"'));
    let kernel = format!("{} {}", std::env::consts::OS, kernel.trim());
    name.map_or(kernel.trim().to_string(), |name| format!("{name}, {}", kernel.trim()))
}

/// Seconds since 1970 as ISO 8601 in UTC (civil date from days, proleptic Gregorian).
fn iso_date(seconds: u64) -> String {
    let (days, rest) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Years counted from March, so that the leap day is the last one of a year; eras of 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3_600, rest / 60 % 60, rest % 60)
}

/// A deliberately wrong kernel, and the check that noticed it.
#[derive(Debug, Clone)]
pub struct Mutant {
    /// Its number in the catalogue, with a letter where a bug has more than one form.
    pub id: String,
    /// What is wrong with it.
    pub name: String,
    /// Check (with operator) that failed on it; `None`: it survived.
    pub killed_by: Option<String>,
}

/// Passed, failed, skipped.
fn totals(rows: &[Row]) -> [usize; 3] {
    let count = |f: fn(&Verdict) -> bool| rows.iter().filter(|r| f(&r.verdict)).count();
    [
        count(|v| matches!(v, Verdict::Passed)),
        count(|v| matches!(v, Verdict::Failed { .. })),
        count(|v| matches!(v, Verdict::Skipped(_))),
    ]
}

fn cases(rows: &[Row]) -> usize {
    rows.iter().map(|r| r.passed).sum()
}

/// The whole verification as JSON; the schema is in `verify/README.md`.
pub fn json(machine: &Machine, options: &Options, rows: &[Row]) -> Value {
    let histogram = |h: &Histogram| {
        let bins: Vec<_> =
            h.bins.iter().map(|(bin, n)| json!([f64::from(*bin) / f64::from(Histogram::BINS), n])).collect();
        json!({ "zero": h.zero, "log10": bins })
    };
    let results: Vec<_> = rows
        .iter()
        .map(|r| {
            let (verdict, text, reproduce) = match &r.verdict {
                Verdict::Passed => ("passed", None, None),
                Verdict::Skipped(why) => ("skipped", Some(why), None),
                Verdict::Failed { failure, reproduce } => ("failed", Some(failure), Some(reproduce)),
            };
            json!({
                "op": r.op, "variant": r.variant, "isa": r.isa.name(), "check": r.check, "cases": r.passed,
                "not_taken": r.not_taken,
                "row_l2": r.metrics.row_l2, "max_over_rms": r.metrics.max_over_rms,
                "bound_multiple": r.metrics.bound_multiple, "nmse": r.metrics.nmse,
                "rows": r.metrics.rows, "tiny_rows": r.metrics.tiny_rows,
                "distribution": {
                    "row_l2": histogram(&r.distribution.row_l2),
                    "bound_multiple": histogram(&r.distribution.bound_multiple),
                },
                "verdict": verdict, "text": text, "reproduce": reproduce,
            })
        })
        .collect();
    let [passed, failed, skipped] = totals(rows);
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "date": machine.date,
        "machine": {
            "cpu": machine.cpu, "arch": machine.arch, "os": machine.os, "isas": machine.isas,
            "threads": machine.threads,
        },
        "seed": options.seed,
        "random_cases": options.random,
        "grid_stride": options.stride,
        "totals": {
            "checks": rows.len(), "passed": passed, "failed": failed, "skipped": skipped, "cases": cases(rows),
        },
        "results": results,
    })
}

/// The whole verification as one HTML page; `mutants` is the kill matrix, where one was made.
pub fn html(machine: &Machine, options: &Options, rows: &[Row], mutants: Option<&[Mutant]>) -> String {
    let [passed, failed, skipped] = totals(rows);
    let mut page = String::from(HEAD);
    let verdict = if failed > 0 { "failed" } else { "passed" };
    page.push_str("<h1>qwen3next verify</h1>\n<dl class=\"facts\">");
    let grid = match options.stride {
        0 | 1 => "whole grid".to_string(),
        n => format!("every {n}th case of the grid"),
    };
    for (name, value) in [
        ("CPU", machine.cpu.clone()),
        ("Instruction sets", machine.isas.join(" ")),
        ("System", format!("{}, {}", machine.os, machine.arch)),
        ("Threads", machine.threads.to_string()),
        ("Version", env!("CARGO_PKG_VERSION").to_string()),
        ("Date", machine.date.clone()),
        ("Inputs", format!("{grid}, {} random cases a check and variant, seed {}", options.random, options.seed)),
    ] {
        page += &format!("<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
    }
    page += "</dl>\n";
    // A run of mutants alone has their matrix and no rows.
    if rows.is_empty() {
        kills(&mut page, mutants.unwrap_or_default());
        return page + "</body></html>\n";
    }
    page += &format!(
        "<p class=\"totals {verdict}\"><b>{passed}</b> checks passed, <b>{failed}</b> failed, <b>{skipped}</b> \
         skipped; {} cases</p>\n",
        cases(rows)
    );
    failures(&mut page, rows);
    overview(&mut page, rows);
    if let Some(mutants) = mutants {
        kills(&mut page, mutants);
    }
    page += "<h2>Errors by case</h2>\n<p class=\"note\">Every measured case that passed, by the size of its error: a \
             bar is a quarter of a decade, its height relative to the fullest bar of its variant. “Exact”: no error at \
             all, not drawn. Beyond the left end counts at the left end. The red line is the bound: right of it a case \
             fails.</p>\n";
    let axes = Axes::of(rows);
    for op in rows.chunk_by(|a, b| a.op == b.op) {
        operator(&mut page, op, &axes);
    }
    page.push_str("</body></html>\n");
    page
}

const HEAD: &str = r#"<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>qwen3next verify</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 68rem; }
body { margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; } h3 { font-size: 1rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .5rem 1.5rem; margin: 0; }
.facts dt { color: #57606a; font-size: .8rem; } .facts dd { margin: 0; overflow-wrap: anywhere; }
.totals { margin: 1.2rem 0; padding: .7rem 1rem; border-left: 5px solid #1a7f37; background: #f0f8f1; }
.totals.failed { border-color: #b3261e; background: #fdf1f0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .6rem; border-bottom: 1px solid #d8dee4; white-space: nowrap; }
th { color: #57606a; font-weight: 600; border-bottom-color: #8c959f; }
td.n, th.n { text-align: right; }
td.text { white-space: normal; overflow-wrap: anywhere; }
.passed-cell { color: #1a7f37; } .failed-cell { color: #b3261e; font-weight: 600; } .skipped-cell { color: #6e5a00; }
.failure { border-left: 5px solid #b3261e; padding: .1rem 0 .1rem 1rem; margin: 1rem 0; }
.failure p { margin: .3rem 0; overflow-wrap: anywhere; }
code { font: .85rem/1.5 ui-monospace, monospace; }
pre { margin: .3rem 0; padding: .5rem .7rem; background: #f3f4f6; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figcaption, .note { color: #57606a; font-size: .85rem; }
svg { display: block; width: 100%; height: auto; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { body { max-width: none; } details > * { display: block; } }
</style></head><body>
"#;

fn escape(text: impl Display) -> String {
    text.to_string().replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A metric in a table: a bitwise check has none.
fn number(value: f64) -> String {
    match value {
        0.0 => "–".into(),
        v if (1e-3..1e3).contains(&v) => format!("{v:.3}"),
        v => format!("{v:.1e}"),
    }
}

/// `rows`: whose verdict it is.
fn cell(verdict: &Verdict, rows: &[Row]) -> String {
    match verdict {
        Verdict::Passed => format!("<td class=\"passed-cell text\">passed{}</td>", escape(not_taken(rows))),
        Verdict::Skipped(why) => format!("<td class=\"skipped-cell text\">skipped: {}</td>", escape(why)),
        Verdict::Failed { .. } => "<td class=\"failed-cell\">FAILED</td>".into(),
    }
}

fn metric_cells(m: &Metrics) -> String {
    [m.row_l2, m.max_over_rms, m.bound_multiple, m.nmse].map(|x| format!("<td class=\"n\">{}</td>", number(x))).concat()
}

const METRIC_HEADS: &str =
    "<th class=\"n\">cases</th><th class=\"n\">worst row L2</th><th class=\"n\">max / row RMS</th>\
                            <th class=\"n\">× bound</th><th class=\"n\">NMSE</th><th>verdict</th>";

fn failures(page: &mut String, rows: &[Row]) {
    for row in rows {
        if let Verdict::Failed { failure, reproduce } = &row.verdict {
            *page += &format!(
                "<div class=\"failure\"><p><b>{} {} {}</b></p><p>{}</p><pre>{}</pre></div>\n",
                escape(row.op),
                escape(row.variant),
                escape(row.check),
                escape(failure),
                escape(reproduce)
            );
        }
    }
}

/// The rows of one variant as one.
struct Group<'a> {
    rows: &'a [Row],
    metrics: Metrics,
    distribution: Distribution,
}

fn groups(rows: &[Row]) -> impl Iterator<Item = Group<'_>> {
    rows.chunk_by(|a, b| a.op == b.op && a.variant == b.variant).map(|rows| {
        let mut group = Group { rows, metrics: Metrics::default(), distribution: Distribution::default() };
        for row in rows {
            group.metrics = group.metrics.worst(row.metrics);
            group.distribution.merge(&row.distribution);
        }
        group
    })
}

fn overview(page: &mut String, rows: &[Row]) {
    *page += "<h2>Operators</h2>\n<div class=\"scroll\"><table><tr><th>operator</th><th>variant</th><th>ISA</th>\
              <th class=\"n\">checks</th>";
    *page += METRIC_HEADS;
    *page += "</tr>\n";
    for group in groups(rows) {
        let first = &group.rows[0];
        let worst = group.rows.iter().map(|r| &r.verdict).max_by_key(|v| match v {
            Verdict::Passed => 0,
            Verdict::Skipped(_) => 1,
            Verdict::Failed { .. } => 2,
        });
        *page += &format!(
            "<tr><td><a href=\"#{0}\">{0}</a></td><td>{1}</td><td>{2}</td><td class=\"n\">{3}</td>\
             <td class=\"n\">{4}</td>{5}{6}</tr>\n",
            escape(first.op),
            escape(first.variant),
            escape(first.isa),
            group.rows.len(),
            cases(group.rows),
            metric_cells(&group.metrics),
            worst.map_or(String::new(), |worst| cell(worst, group.rows)),
        );
    }
    *page +=
        "</table></div>\n<p class=\"note\">The worst over all passed cases; “–”: bitwise checks alone, or no error at \
              all. “× bound”: largest error as a multiple of its derived bound, at most 1 in a pass.</p>\n";
}

fn kills(page: &mut String, mutants: &[Mutant]) {
    let killed = mutants.iter().filter(|m| m.killed_by.is_some()).count();
    *page += &format!(
        "<h2>Mutants</h2>\n<p>{killed} of {} deliberately wrong kernels were noticed.</p>\n<div class=\"scroll\">\
         <table><tr><th class=\"n\">#</th><th>wrong kernel</th><th>noticed by</th></tr>\n",
        mutants.len()
    );
    for m in mutants {
        let by = match &m.killed_by {
            Some(check) => format!("<td class=\"text\">{}</td>", escape(check)),
            None => "<td class=\"failed-cell\">SURVIVED</td>".into(),
        };
        *page += &format!(
            "<tr><td class=\"n\">{}</td><td class=\"text\">{}</td>{by}</tr>\n",
            escape(&m.id),
            escape(&m.name)
        );
    }
    *page += "</table></div>\n";
}

fn operator(page: &mut String, rows: &[Row], axes: &Axes) {
    let op = escape(rows[0].op);
    *page += &format!("<h3 id=\"{op}\">{op}</h3>\n");
    match plot(rows, axes) {
        Some(svg) => {
            *page += &format!("<figure role=\"img\" aria-label=\"Error distributions of {op}\">{svg}</figure>\n")
        }
        None => {
            *page += "<p class=\"note\">Nothing to plot: every measured case was exact, or nothing was measured.</p>\n"
        }
    }
    let open = if rows.iter().any(|r| matches!(r.verdict, Verdict::Failed { .. })) { " open" } else { "" };
    *page += &format!(
        "<details{open}><summary>every check ({})</summary><div class=\"scroll\"><table><tr><th>variant</th><th>check\
         </th>{METRIC_HEADS}</tr>\n",
        rows.len()
    );
    for r in rows {
        *page += &format!(
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{}</td>{}{}</tr>\n",
            escape(r.variant),
            escape(r.check),
            r.passed,
            metric_cells(&r.metrics),
            cell(&r.verdict, std::slice::from_ref(r))
        );
        if let Verdict::Failed { failure, reproduce } = &r.verdict {
            *page += &format!(
                "<tr><td></td><td class=\"text\" colspan=\"7\">{}<pre>{}</pre></td></tr>\n",
                escape(failure),
                escape(reproduce)
            );
        }
    }
    *page += "</table></div></details>\n";
}

const WIDTH: u32 = 1000;
const LABELS: u32 = 210;
const BAND: u32 = 40;
const AXIS: u32 = 24;
const TITLE: u32 = 26;

/// The ranges of both panels, in log10: the same for all operators, so that they compare at a glance.
struct Axes {
    row_l2: (f64, f64),
    bound: (f64, f64),
}

impl Axes {
    fn of(rows: &[Row]) -> Axes {
        let ends = |pick: fn(&Distribution) -> &Histogram, lowest: f64, low: f64, high: f64| {
            let bins = rows.iter().flat_map(|r| pick(&r.distribution).bins.keys()).map(|&b| log10(b));
            let (low, high) = bins.fold((low, high), |(a, b), x| (x.min(a), (x + 1.0 / PER_DECADE).max(b)));
            (low.floor().max(lowest), high)
        };
        Axes { row_l2: ends(|d| &d.row_l2, -12.0, -8.0, -4.0), bound: ends(|d| &d.bound_multiple, -6.0, -3.0, 0.25) }
    }
}

const PER_DECADE: f64 = Histogram::BINS as f64;

fn log10(bin: i32) -> f64 {
    f64::from(bin) / PER_DECADE
}

/// One band a variant, two panels: worst row L2 and multiple of the bound. `None` where nothing was measured.
fn plot(rows: &[Row], axes: &Axes) -> Option<String> {
    let groups: Vec<Group> = groups(rows).filter(|g| g.distribution.bound_multiple.count() > 0).collect();
    if groups.iter().all(|g| g.distribution.bound_multiple.bins.is_empty() && g.distribution.row_l2.bins.is_empty()) {
        return None;
    }
    let height = TITLE + BAND * groups.len() as u32 + AXIS;
    let mut svg = String::new();
    draw(&mut svg, &groups, axes, height).expect("plotters draws into a string");
    Some(svg)
}

fn draw(svg: &mut String, groups: &[Group], axes: &Axes, height: u32) -> Result<(), Box<dyn std::error::Error>> {
    let ink = RGBColor(27, 31, 36);
    let grey = RGBColor(87, 96, 106);
    let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let (labels, panels) = root.split_horizontally(LABELS);
    let right = Pos::new(HPos::Right, VPos::Center);
    for (i, group) in groups.iter().enumerate() {
        let y = (TITLE + BAND * i as u32 + BAND / 2) as i32;
        let name = ("sans-serif", 14).into_font().color(&ink).pos(right);
        labels.draw(&Text::new(group.rows[0].variant, (LABELS as i32 - 10, y - 8), name))?;
        let h = &group.distribution.bound_multiple;
        let mut note = format!("{} case{}", h.count(), if h.count() == 1 { "" } else { "s" });
        if h.zero > 0 {
            write!(note, ", {} exact", h.zero)?;
        }
        let small = ("sans-serif", 11).into_font().color(&grey).pos(right);
        labels.draw(&Text::new(note, (LABELS as i32 - 10, y + 9), small))?;
    }
    let (left, right) = panels.split_horizontally((WIDTH - LABELS) / 2);
    let l2: Vec<&Histogram> = groups.iter().map(|g| &g.distribution.row_l2).collect();
    let bound: Vec<&Histogram> = groups.iter().map(|g| &g.distribution.bound_multiple).collect();
    panel(&left, "log10 of the worst row's relative L2 error", &l2, axes.row_l2, false, RGBColor(31, 111, 178))?;
    panel(&right, "log10 of the largest multiple of the bound", &bound, axes.bound, true, RGBColor(176, 96, 16))?;
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn panel(
    area: &Area,
    title: &str,
    histograms: &[&Histogram],
    (low, high): (f64, f64),
    at_bound: bool,
    color: RGBColor,
) -> Result<(), Box<dyn std::error::Error>> {
    let ink = RGBColor(27, 31, 36);
    let (title_area, area) = area.split_vertically(TITLE);
    let middle = Pos::new(HPos::Center, VPos::Center);
    let width = area.dim_in_pixel().0 as i32;
    let style = ("sans-serif", 13).into_font().color(&ink).pos(middle);
    title_area.draw(&Text::new(title, (width / 2, TITLE as i32 / 2), style))?;
    let mut chart = ChartBuilder::on(&area)
        .margin_left(8)
        .margin_right(12)
        .x_label_area_size(AXIS)
        .build_cartesian_2d(low..high, (histograms.len() as f64)..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_labels(8)
        .x_label_formatter(&|x| if x.fract().abs() < 1e-9 { format!("{x:.0}") } else { format!("{x:.1}") })
        .x_label_style(("sans-serif", 12))
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(222, 226, 230))
        .draw()?;
    for (i, h) in histograms.iter().enumerate() {
        let base = i as f64 + 0.92;
        let first = (low * PER_DECADE) as i32;
        let mut bins = BTreeMap::<i32, usize>::new();
        h.bins.iter().for_each(|(bin, n)| *bins.entry((*bin).max(first)).or_default() += n);
        let full = bins.values().copied().max().unwrap_or(1) as f64;
        chart.draw_series(bins.iter().map(|(bin, n)| {
            let (x, tall) = (log10(*bin), 0.8 * *n as f64 / full);
            Rectangle::new([(x, base - tall), (x + 0.92 / PER_DECADE, base)], color.filled())
        }))?;
        chart.draw_series([PathElement::new([(low, base), (high, base)], RGBColor(190, 196, 202))])?;
    }
    if at_bound {
        let red = RGBColor(179, 38, 30);
        chart.draw_series([PathElement::new([(0.0, 0.0), (0.0, histograms.len() as f64)], red.stroke_width(2))])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        assert_eq!(iso_date(0), "1970-01-01T00:00:00Z");
        assert_eq!(iso_date(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(iso_date(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(iso_date(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn the_page_escapes_what_it_quotes_and_names_survivors() {
        let row = Row {
            op: "norm",
            variant: "a<b",
            isa: Isa::SCALAR,
            check: "reference",
            passed: 3,
            not_taken: BTreeMap::from([("dtype bf16".into(), 2)]),
            metrics: Metrics::default(),
            distribution: Distribution::default(),
            verdict: Verdict::Failed { failure: "x & y".into(), reproduce: "qwen3next verify --op norm".into() },
        };
        let mutants = [
            Mutant { id: "1".into(), name: "eps inside".into(), killed_by: Some("norm reference".into()) },
            Mutant { id: "2b".into(), name: "no eps".into(), killed_by: None },
        ];
        let page = html(&Machine::here(), &Options::default(), &[row], Some(&mutants));
        for text in ["a&lt;b", "x &amp; y", "1 of 2 deliberately", "SURVIVED", "<b>1</b> failed"] {
            assert!(page.contains(text), "{text}");
        }
        assert!(!page.contains("a<b") && !page.contains("http"), "{page}");
    }
}
