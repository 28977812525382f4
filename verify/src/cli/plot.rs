//! Speeds as a picture.

use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

/// Points of one line.
pub struct Series {
    /// In the legend.
    pub name: String,
    /// (x, y).
    pub points: Vec<(f64, f64)>,
}

/// Tokens per second over `x`, both axes logarithmic.
pub fn svg(caption: &str, x: &str, series: &[Series]) -> anyhow::Result<String> {
    svg_of(caption, x, "tokens / s", series, true)
}

/// Lines; both axes logarithmic, or both from 0.
pub fn svg_of(caption: &str, x: &str, y: &str, series: &[Series], logarithmic: bool) -> anyhow::Result<String> {
    let mut svg = String::new();
    let range = |of: fn(&(f64, f64)) -> f64| {
        let all = series.iter().flat_map(|s| s.points.iter().map(of));
        all.fold((f64::MAX, 0.0f64), |(a, b), v| (a.min(v), b.max(v)))
    };
    let (across, up) = (range(|p| p.0), range(|p| p.1));
    {
        let root = SVGBackend::with_string(&mut svg, (900, 560)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root);
        chart.caption(caption, ("sans-serif", 20)).margin(16).x_label_area_size(44).y_label_area_size(80);
        if logarithmic {
            let across = (across.0 / 1.1..across.1 * 1.1).log_scale();
            lines(chart.build_cartesian_2d(across, (up.0 / 1.3..up.1 * 1.3).log_scale())?, x, y, series)?;
        } else {
            lines(chart.build_cartesian_2d(0.0..across.1.max(1.0), 0.0..up.1.max(1e-9) * 1.1)?, x, y, series)?;
        }
        root.present()?;
    }
    Ok(svg)
}

type Chart<'a, 'b, X, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>;

fn lines<'a, 'b: 'a, X, Y>(mut chart: Chart<'a, 'b, X, Y>, x: &str, y: &str, series: &[Series]) -> anyhow::Result<()>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart.configure_mesh().x_desc(x).y_desc(y).draw()?;
    for (i, s) in series.iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(s.points.iter().copied(), color.stroke_width(2)).point_size(3))?
            .label(&s.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    let mut labels = chart.configure_series_labels();
    labels.background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    Ok(())
}

/// A group of bars side by side.
pub struct Bars {
    /// Below it.
    pub name: String,
    /// A bar each.
    pub values: Vec<f64>,
}

/// Groups of bars, each group with a scale of its own: a prompt's speed would flatten a generation's.
pub fn bars(caption: &str, y: &str, names: &[String], groups: &[Bars]) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (900, 560)).into_drawing_area();
        root.fill(&WHITE)?;
        let root = root.titled(caption, ("sans-serif", 20))?;
        for (group, area) in groups.iter().zip(root.split_evenly((1, groups.len().max(1)))) {
            let most = group.values.iter().copied().fold(1e-9, f64::max);
            let mut chart = ChartBuilder::on(&area)
                .caption(format!("{}, {y}", group.name), ("sans-serif", 16))
                .margin(12)
                .y_label_area_size(60)
                .build_cartesian_2d(0.0..names.len().max(1) as f64, 0.0..most * 1.4)?;
            chart.configure_mesh().disable_x_mesh().disable_x_axis().draw()?;
            for (i, (&value, name)) in group.values.iter().zip(names).enumerate() {
                let (color, left) = (Palette99::pick(i).to_rgba(), i as f64);
                chart
                    .draw_series([Rectangle::new([(left + 0.15, 0.0), (left + 0.85, value)], color.filled())])?
                    .label(format!("{name}: {value:.1}"))
                    .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
            }
            chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        }
        root.present()?;
    }
    Ok(svg)
}
