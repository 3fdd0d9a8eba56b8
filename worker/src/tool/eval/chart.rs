//! Pictures of an evaluation, as SVG.

use std::fmt::Write as _;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 420.0;
const MARGIN: f64 = 56.0;

/// Accuracy over multiply–accumulates: the curve of dynamic inference, and the exits as points.
pub(super) fn curve(curve: &[[f64; 2]], exits: &[(&str, [f64; 2])]) -> String {
    let points = || curve.iter().chain(exits.iter().map(|(_, point)| point));
    let [x, y] = [0, 1].map(|axis| Range::of(points().map(|point| point[axis])));
    let place = |point: &[f64; 2]| {
        let across = MARGIN + x.share(point[0]) * (WIDTH - 2.0 * MARGIN);
        let up = HEIGHT - MARGIN - y.share(point[1]) * (HEIGHT - 2.0 * MARGIN);
        [across, up]
    };
    let mut svg = head(WIDTH, HEIGHT);
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        let [macs, accuracy] = [x.at(share), y.at(share)];
        let [across, up] = place(&[macs, accuracy]);
        let (bottom, right) = (HEIGHT - MARGIN, WIDTH - MARGIN);
        add(
            &mut svg,
            format_args!(
                "<path d=\"M{across:.1} {MARGIN}V{bottom}M{MARGIN} {up:.1}H{right}\" stroke=\"#ddd\"/>"
            ),
        );
        text(&mut svg, across, bottom + 18.0, "middle", &format!("{:.0}", macs / 1e6));
        text(&mut svg, MARGIN - 6.0, up + 4.0, "end", &format!("{:.1}", accuracy * 100.0));
    }
    let line: Vec<String> =
        curve.iter().map(place).map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
    let line = line.join(" ");
    add(
        &mut svg,
        format_args!(
            "<polyline points=\"{line}\" fill=\"none\" stroke=\"#06c\" stroke-width=\"2\"/>"
        ),
    );
    for (name, point) in exits {
        let [across, up] = place(point);
        add(
            &mut svg,
            format_args!("<circle cx=\"{across:.1}\" cy=\"{up:.1}\" r=\"4\" fill=\"#c30\"/>"),
        );
        text(&mut svg, across, up - 8.0, "middle", name);
    }
    text(&mut svg, WIDTH / 2.0, HEIGHT - 14.0, "middle", "million multiply–accumulates an image");
    text(
        &mut svg,
        MARGIN,
        MARGIN - 14.0,
        "start",
        "top-1, %: dynamic inference (line), exits alone (points)",
    );
    svg + "</svg>\n"
}

/// A matrix of labels (rows) by answers (columns): the darker, the larger the share of the row.
pub(super) fn confusion(rows: &[Vec<u64>], names: &[&str]) -> String {
    let columns = rows.len().max(1);
    let side = (480.0 / columns as f64).clamp(1.0, 28.0);
    let left = 120.0;
    let (width, height) = (left + side * columns as f64 + 20.0, side * rows.len() as f64 + 60.0);
    let mut svg = head(width, height);
    text(&mut svg, left, 20.0, "start", "answers of the exit merge, by label");
    for (row, (counts, name)) in rows.iter().zip(names).enumerate() {
        let (total, y) = (counts.iter().sum::<u64>().max(1) as f64, 30.0 + side * row as f64);
        if side >= 8.0 {
            text(&mut svg, left - 6.0, y + side * 0.7, "end", name);
        }
        for (column, &count) in counts.iter().take(columns).enumerate().filter(|(_, n)| **n > 0) {
            let (x, share) = (left + side * column as f64, count as f64 / total);
            add(
                &mut svg,
                format_args!(
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{side:.1}\" height=\"{side:.1}\" fill=\"#06c\" \
                 fill-opacity=\"{share:.3}\"><title>{count}</title></rect>"
                ),
            );
        }
    }
    svg + "</svg>\n"
}

fn head(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    )
}

fn add(svg: &mut String, element: std::fmt::Arguments<'_>) {
    writeln!(svg, "{element}").expect("memory takes text");
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    add(
        svg,
        format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>"),
    );
}

/// Of the values on an axis.
struct Range {
    low: f64,
    high: f64,
}

impl Range {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        Self { low, high: if high > low { high } else { low + 1.0 } }
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn at(&self, share: f64) -> f64 {
        self.low + share * (self.high - self.low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_rises_from_left_to_right_and_names_are_escaped() {
        let svg = curve(&[[1e8, 0.5], [2e8, 0.7]], &[("a<b", [1.5e8, 0.6])]);
        assert!(svg.contains("points=\"56.0,364.0 584.0,56.0\""), "{svg}");
        assert!(svg.contains("a&lt;b") && svg.ends_with("</svg>\n"));
        let one = curve(&[[1e8, 0.5]], &[]);
        assert!(!one.contains("NaN"), "{one}");
    }

    #[test]
    fn a_row_of_the_matrix_is_shaded_by_its_shares() {
        let svg = confusion(&[vec![3, 1], vec![0, 0]], &["a", "b"]);
        assert!(svg.contains("fill-opacity=\"0.750\"") && svg.contains("fill-opacity=\"0.250\""));
        assert_eq!(svg.matches("<title>").count(), 2);
    }
}
