//! Learning curves as SVG: loss, top-1 of the exits, learning rate, over the steps.

use std::fmt::Write as _;

use cluster::ExitScores;

use super::Course;

const WIDTH: f64 = 720.0;
const PANEL: f64 = 200.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 30.0;
/// Most points of a line; where there are more steps, neighbours are averaged.
const POINTS: usize = 600;
const COLOURS: [&str; 5] = ["#06c", "#c30", "#390", "#90c", "#888"];

/// A line: its name, and places (step, value).
struct Line {
    name: String,
    points: Vec<[f64; 2]>,
}

/// The picture of a run, three panels one below the other.
pub(super) fn svg(course: &Course) -> String {
    let steps = |value: &dyn Fn(&cluster::StepMetrics) -> f64| {
        let points = course.steps.iter().map(|(_, step, metrics)| [step.0 as f64, value(metrics)]);
        thinned(&points.collect::<Vec<_>>())
    };
    let evaluated = |value: &dyn Fn(&cluster::Evaluation) -> f64| {
        course
            .evaluations
            .iter()
            .map(|(_, evaluation)| [evaluation.step.0 as f64, value(evaluation)])
            .collect::<Vec<_>>()
    };
    let line = |name: &str, points| Line { name: name.to_owned(), points };
    let losses = [
        line("training loss", steps(&|metrics| f64::from(metrics.loss))),
        line("validation loss", evaluated(&|evaluation| evaluation.weights.loss)),
    ];
    let mut accuracies: Vec<Line> = (0..ExitScores::EXITS.len())
        .map(|exit| line(ExitScores::EXITS[exit], evaluated(&|e| e.weights.top1[exit] * 100.0)))
        .collect();
    accuracies.push(line("merge, average", evaluated(&|e| e.ema.top1[3] * 100.0)));
    let rates = [line("learning rate", steps(&|metrics| metrics.learning_rate))];
    let last = course.steps.last().map_or(1.0, |(_, step, _)| step.0 as f64);
    let height = 3.0 * PANEL + TOP;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH:.0} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    let panels: [(&str, &[Line]); 3] =
        [("loss", &losses), ("top-1, %", &accuracies), ("learning rate", &rates)];
    for (number, (title, lines)) in (0_u32..).zip(panels) {
        panel(&mut svg, f64::from(number) * PANEL, last, title, lines);
    }
    svg + "</svg>\n"
}

/// At most [`POINTS`] points, each the mean of as many neighbours.
fn thinned(points: &[[f64; 2]]) -> Vec<[f64; 2]> {
    let together = points.len().div_ceil(POINTS).max(1);
    let mean = |group: &[[f64; 2]]| {
        let sum = group.iter().fold([0.0; 2], |[x, y], point| [x + point[0], y + point[1]]);
        sum.map(|sum| sum / group.len() as f64)
    };
    points.chunks(together).map(mean).collect()
}

fn panel(svg: &mut String, top: f64, last: f64, title: &str, lines: &[Line]) {
    let finite = || {
        let values = lines.iter().flat_map(|line| &line.points).map(|point| point[1]);
        values.filter(|value| value.is_finite())
    };
    let low = finite().fold(f64::INFINITY, f64::min).min(0.0);
    let high = finite().fold(f64::NEG_INFINITY, f64::max);
    let high = if high > low { high } else { low + 1.0 };
    let (upper, lower) = (top + TOP, top + PANEL - 24.0);
    let place = |[step, value]: [f64; 2]| {
        let across = LEFT + step / last.max(1.0) * (WIDTH - LEFT - 20.0);
        [across, lower - (value - low) / (high - low) * (lower - upper)]
    };
    for share in [0.0, 0.5, 1.0] {
        let value = low + share * (high - low);
        let [_, y] = place([0.0, value]);
        let right = WIDTH - 20.0;
        add(svg, format_args!("<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#ddd\"/>"));
        let [x, label] = [LEFT - 6.0, y + 4.0];
        add(
            svg,
            format_args!("<text x=\"{x}\" y=\"{label:.1}\" text-anchor=\"end\">{value:.3}</text>"),
        );
    }
    let words = top + TOP - 10.0;
    add(svg, format_args!("<text x=\"{LEFT}\" y=\"{words:.1}\">{title}</text>"));
    let (right, below) = (WIDTH - 20.0, lower + 16.0);
    add(
        svg,
        format_args!("<text x=\"{right}\" y=\"{below:.1}\" text-anchor=\"end\">step {last}</text>"),
    );
    for (line, (colour, number)) in lines.iter().zip(COLOURS.iter().zip(0_u32..)) {
        let shown = line.points.iter().filter(|point| point[1].is_finite());
        let shown = shown.map(|point| place(*point)).map(|[x, y]| format!("{x:.1},{y:.1}"));
        let shown = shown.collect::<Vec<_>>().join(" ");
        add(svg, format_args!("<polyline points=\"{shown}\" fill=\"none\" stroke=\"{colour}\"/>"));
        let x = LEFT + 110.0 + f64::from(number) * 105.0;
        let name = &line.name;
        add(svg, format_args!("<text x=\"{x}\" y=\"{words:.1}\" fill=\"{colour}\">{name}</text>"));
    }
}

fn add(svg: &mut String, element: std::fmt::Arguments<'_>) {
    writeln!(svg, "{element}").expect("memory takes text");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::curves::tests::course;

    #[test]
    fn lines_go_from_left_to_right_and_down_with_the_loss() {
        let svg = svg(&course());
        assert_eq!(svg.matches("<polyline").count(), 8);
        assert!(svg.contains("points=\"276.0,30.0 488.0,54.3 700.0,176.0\""), "{svg}");
        assert!(svg.contains("step 3<") && svg.contains("merge, average"));
        let empty = super::svg(&Course::default());
        assert!(!empty.contains("NaN") && !empty.contains("inf"), "{empty}");
    }

    #[test]
    fn many_steps_are_averaged() {
        let points: Vec<[f64; 2]> = (0..1300_u32).map(|i| [f64::from(i), f64::from(i)]).collect();
        let thin = thinned(&points);
        assert_eq!((thin.len(), thin[0]), (434, [1.0, 1.0]));
    }
}
