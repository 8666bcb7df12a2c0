//! Plots of a report, as SVG.

use std::fmt::Write as _;

use crate::bench::{autoscale, report::Report};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 320.0;
/// Left, top, right and bottom of the area.
const AREA: (f64, f64, f64, f64) = (60.0, 40.0, 700.0, 270.0);
const BLUE: &str = "#2563a8";
const GREY: &str = "#888";

/// A plot with axes from 0.
struct Plot {
    text: String,
    most: (f64, f64),
}

impl Plot {
    fn new(title: &str, (x_name, y_name): (&str, &str), most: (f64, f64)) -> Self {
        let most = (most.0.max(1e-9), most.1.max(1e-9));
        let mut plot = Self { text: String::new(), most };
        let (left, top, right, bottom) = AREA;
        let _ = write!(
            plot.text,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
             <path d=\"M{left} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"black\"/>\n"
        );
        plot.label((left + right) / 2.0, 22.0, "middle", title);
        plot.label((left + right) / 2.0, bottom + 36.0, "middle", x_name);
        plot.label(left, top - 8.0, "middle", y_name);
        for value in ticks(most.0) {
            plot.label(plot.place((value, 0.0)).0, bottom + 18.0, "middle", &value.to_string());
        }
        for value in ticks(most.1) {
            plot.label(left - 6.0, plot.place((0.0, value)).1 + 4.0, "end", &value.to_string());
        }
        plot
    }

    /// Where a point is drawn.
    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let (left, top, right, bottom) = AREA;
        (left + (right - left) * x / self.most.0, bottom - (bottom - top) * y / self.most.1)
    }

    fn label(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(self.text, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>");
    }

    fn line(&mut self, points: &[(f64, f64)], colour: &str, dashes: &str) {
        let places: Vec<String> = points
            .iter()
            .map(|point| {
                let (x, y) = self.place(*point);
                format!("{x:.1},{y:.1}")
            })
            .collect();
        let _ = writeln!(
            self.text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" stroke-dasharray=\"{dashes}\"/>",
            places.join(" ")
        );
    }

    /// A bar from the axis up, between two values of x.
    fn bar(&mut self, from: f64, to: f64, height: f64, colour: &str) {
        let ((x, y), (end, bottom)) = (self.place((from, height)), self.place((to, 0.0)));
        let (width, height) = (end - x, bottom - y);
        let _ = writeln!(
            self.text,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        );
    }

    fn end(mut self) -> String {
        self.text += "</svg>\n";
        self.text
    }
}

/// Three to six round numbers from 0 up to `most`.
fn ticks(most: f64) -> Vec<f64> {
    let power = 10f64.powf((most / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| most / step <= 5.5);
    let step = step.unwrap_or(most);
    // Rounded, so that 3 x 0.1 is written 0.3.
    let value = |index: u32| (f64::from(index) * step / power).round() * power;
    let shortest = |value: f64| format!("{value:.9}").parse().unwrap_or(value);
    (0..=(most / step + 1e-9) as u32).map(|index| shortest(value(index))).collect()
}

/// Ends a second over time, with what theory promises and the measured time shaded.
pub(crate) fn throughput(report: &Report) -> String {
    let points = &report.plots.throughput;
    let theory = report.throughput.theoretical;
    let high = points.iter().map(|(_, rate)| *rate).chain(theory).fold(0.0, f64::max) * 1.1;
    let long = points.last().map_or(1.0, |(at, _)| *at);
    let title = "Simulated cluster: requests ended a second (dashed: theory; shaded: measured)";
    let mut plot = Plot::new(title, ("seconds", "1/s"), (long, high));
    let end = (report.warm_up + report.measured).min(long);
    plot.bar(report.warm_up.min(end), end, high, "#eef3f9");
    if let Some(theory) = theory {
        plot.line(&[(0.0, theory), (long, theory)], GREY, "5 4");
    }
    plot.line(points, BLUE, "");
    plot.end()
}

/// The distribution of latencies, with median and 99th percentile.
pub(crate) fn latency(report: &Report) -> String {
    let bars = &report.plots.latency;
    let high = bars.iter().map(|(_, count)| *count).max().unwrap_or(1) as f64;
    let long = bars.last().map_or(1.0, |(bound, _)| *bound);
    let title = "Simulated cluster: latency (dashed: median and 99th percentile)";
    let mut plot = Plot::new(title, ("seconds", "requests"), (long, high * 1.1));
    let mut from = 0.0;
    for &(bound, count) in bars {
        plot.bar(from, bound, count as f64, BLUE);
        from = bound;
    }
    for value in [report.latency.p50, report.latency.p99] {
        plot.line(&[(value.min(long), 0.0), (value.min(long), high)], GREY, "5 4");
    }
    plot.end()
}

/// Hands over time, with those that arrivals keep busy.
pub(crate) fn autoscale(report: &autoscale::Report) -> String {
    let samples = &report.samples;
    let high = samples.iter().map(|sample| f64::from(sample.hands).max(sample.needed)).fold(1.0, f64::max) * 1.1;
    let title = "Simulated cluster: hands added and drained as advised (dashed: those that arrivals keep busy)";
    let mut plot = Plot::new(title, ("seconds", "hands"), (3.0 * report.phase, high));
    let steps = |value: fn(&autoscale::Sample) -> f64| {
        let corners =
            samples.windows(2).flat_map(|pair| [(pair[0].at, value(&pair[0])), (pair[1].at, value(&pair[0]))]);
        corners.collect::<Vec<_>>()
    };
    plot.line(&steps(|sample| sample.needed), GREY, "5 4");
    plot.line(&steps(|sample| f64::from(sample.hands)), BLUE, "");
    plot.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(58.5), [0.0, 20.0, 40.0]);
        assert_eq!(ticks(0.5), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]);
        assert_eq!(ticks(143.0), [0.0, 50.0, 100.0]);
        for most in [1e-9, 0.013, 1.0, 7.0, 99.9, 12_345.0] {
            assert!((3..=7).contains(&ticks(most).len()), "{most}: {:?}", ticks(most));
        }
    }

    #[test]
    fn points_lie_where_they_belong() {
        let mut plot = Plot::new("a < b", ("x", "y"), (10.0, 4.0));
        assert_eq!((plot.place((0.0, 0.0)), plot.place((10.0, 4.0))), ((AREA.0, AREA.3), (AREA.2, AREA.1)));
        plot.line(&[(0.0, 0.0), (10.0, 4.0)], BLUE, "");
        plot.bar(0.0, 5.0, 2.0, GREY);
        let text = plot.end();
        assert!(text.contains("a &lt; b") && text.contains("points=\"60.0,270.0 700.0,40.0\""), "{text}");
        assert!(text.contains("width=\"320.0\" height=\"115.0\"") && text.ends_with("</svg>\n"), "{text}");
    }
}
