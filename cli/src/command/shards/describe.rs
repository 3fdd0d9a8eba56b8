//! `percheron shards inspect` and `stats`: what a split is, and what it holds.

use ::shards::{Dataset, Stats, stats::SIDE_STEP, stats::SIDE_STEPS, stats::Spread};
use indicatif::HumanBytes;

use crate::print;

/// Columns of the longest bar of a plot.
const BAR_MAX: u64 = 40;

/// What the manifest and the indexes say about a split, in a few lines.
pub(super) fn inspect(dataset: &Dataset) {
    let manifest = dataset.manifest();
    let archives = dataset.indexes().iter().map(|index| index.tar_length).sum();
    let records = || dataset.indexes().iter().flat_map(|index| &index.records);
    let images: u64 = records().map(|record| u64::from(record.length)).sum();
    let side = |side: fn(u16, u16) -> u16| {
        let sides = records().map(|record| side(record.width, record.height));
        let (least, most) = (sides.clone().min().unwrap_or(0), sides.max().unwrap_or(0));
        if least == most { format!("{least} px") } else { format!("{least} to {most} px") }
    };
    let provenance = &manifest.provenance;
    print::out(&format!("split {}", manifest.split));
    row("samples", &print::grouped(manifest.samples));
    row("classes", &format!("{} ({})", manifest.classes.len(), some_of(&manifest.classes)));
    row("shards", &format!("{}, {}", manifest.shards.len(), HumanBytes(archives)));
    row("images", &format!("{} on average", HumanBytes(images / manifest.samples.max(1))));
    row("short side", &side(u16::min));
    row("long side", &side(u16::max));
    row("source", &format!("{}, packed with seed {}", provenance.source, provenance.seed));
    row("converted", &format!("{} images", provenance.converted));
    if !provenance.skipped.is_empty() {
        row("left out", &format!("{} corrupt files", provenance.skipped.len()));
    }
    if let Some(attribution) = &provenance.attribution {
        row("attribution", attribution);
    }
    if let Some(licence) = &provenance.licence {
        row("licence", licence);
    }
}

/// The sizes, kinds and classes of a split, with plots.
pub(super) fn stats(split: &str, stats: &Stats) {
    let kinds = &stats.kinds;
    print::out(&format!("split {split}"));
    row("samples", &print::grouped(stats.samples));
    row("shards", &format!("{}, {}", stats.shards, HumanBytes(stats.tar_bytes)));
    row("images", &HumanBytes(stats.bytes).to_string());
    row("bytes", &spread(stats.image_bytes));
    row("width", &spread(stats.width));
    row("height", &spread(stats.height));
    row(
        "chroma",
        &format!(
            "{} 4:4:4, {} 4:2:2, {} 4:2:0, {} other, {} grey",
            kinds.chroma_444, kinds.chroma_422, kinds.chroma_420, kinds.chroma_other, kinds.grey
        ),
    );
    row("of these", &format!("{} CMYK, {} re-encoded", kinds.cmyk, kinds.re_encoded));
    print::out("\n  short side in pixels");
    let used = |side: &(usize, u64)| side.1 > 0;
    let sides: Vec<(usize, u64)> = stats.short_sides.iter().copied().enumerate().collect();
    let first = sides.iter().position(used).unwrap_or(0);
    let last = sides.iter().rposition(used).unwrap_or(0);
    let names = sides[first..=last].iter().map(|&(step, count)| {
        let from = step * SIDE_STEP;
        let open = step + 1 == SIDE_STEPS;
        let name =
            if open { format!("{from} on") } else { format!("{from}-{}", from + SIDE_STEP - 1) };
        (name, count)
    });
    plot(&names.collect::<Vec<_>>());
    print::out("\n  samples of a class");
    let classes = stats.classes.iter().map(|class| (class.name.clone(), class.samples));
    plot(&classes.collect::<Vec<_>>());
}

fn row(name: &str, value: &str) {
    print::out(&format!("  {name:<12} {value}"));
}

fn spread(Spread { min, median, max }: Spread) -> String {
    format!("{min} to {max}, half at most {median}")
}

/// A bar a line, the longest of fixed length.
fn plot(rows: &[(String, u64)]) {
    let longest = rows.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    for (name, count) in rows {
        print::out(&format!(
            "  {name:<width$} {:>9} {}",
            print::grouped(*count),
            bar(*count, longest)
        ));
    }
}

/// Something is seen of what is not nothing.
fn bar(count: u64, longest: u64) -> String {
    let columns = (count * BAR_MAX).div_ceil(longest);
    "#".repeat(usize::try_from(columns).expect("at most the longest bar"))
}

fn some_of(names: &[String]) -> String {
    const SHOWN_MAX: usize = 10;
    let shown = names.iter().take(SHOWN_MAX).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN_MAX { format!("{shown}, …") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_in_proportion_and_few_is_not_none() {
        assert_eq!(bar(50, 50).len(), 40);
        assert_eq!(bar(25, 50).len(), 20);
        assert_eq!(bar(1, 5000).len(), 1);
        assert_eq!(bar(0, 50), "");
    }
}
