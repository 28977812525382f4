//! Speeds as a picture.

use plotters::prelude::*;

/// Points of one line.
pub struct Series {
    /// In the legend.
    pub name: String,
    /// (x, tokens a second).
    pub points: Vec<(f64, f64)>,
}

/// Tokens per second over `x`, both axes logarithmic.
pub fn svg(caption: &str, x: &str, series: &[Series]) -> anyhow::Result<String> {
    let mut svg = String::new();
    let range = |of: fn(&(f64, f64)) -> f64, margin: f64| {
        let all = series.iter().flat_map(|s| s.points.iter().map(of));
        let (low, high) = all.fold((f64::MAX, 0.0f64), |(a, b), v| (a.min(v), b.max(v)));
        (low / margin..high * margin).log_scale()
    };
    {
        let root = SVGBackend::with_string(&mut svg, (900, 560)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(caption, ("sans-serif", 20))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(80)
            .build_cartesian_2d(range(|p| p.0, 1.1), range(|p| p.1, 1.3))?;
        chart.configure_mesh().x_desc(x).y_desc("tokens / s").draw()?;
        for (i, s) in series.iter().enumerate() {
            let color = Palette99::pick(i).to_rgba();
            chart
                .draw_series(LineSeries::new(s.points.iter().copied(), color.stroke_width(2)).point_size(3))?
                .label(&s.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        root.present()?;
    }
    Ok(svg)
}
