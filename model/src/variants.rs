//! The one table of the reference's registered variants: backbone, sizes, and numbers of latent tokens (SPEC
//! §3, §16.2).

use crate::backbone::BackboneSpec;
use crate::backbone::mobilenet::MobileNetSpec;
use crate::backbone::regnet::RegNetSpec;
use crate::backbone::resnet::{BlockKind, ResNetSpec};

/// A registered network: its backbone and its number of latent tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variant {
    pub(crate) backbone: BackboneSpec,
    pub(crate) tokens: i64,
}

/// The token counts that are registered for each backbone.
const VARIANTS: [(&str, BackboneSpec, &[i64]); 17] = [
    ("reg400m", regnet([48, 104, 208, 440], [1, 3, 6, 6], 8), &[32, 64, 128, 256, 512]),
    ("reg800m", regnet([64, 144, 320, 784], [1, 3, 8, 2], 16), &[32, 64, 128, 256, 512]),
    ("reg1x6g", regnet([48, 120, 336, 888], [2, 6, 17, 2], 24), &[128, 256, 512]),
    ("reg3x2g", regnet([72, 216, 576, 1512], [2, 5, 13, 1], 24), &[128, 256, 512]),
    ("resnet18", resnet(BlockKind::Basic, 64, [2, 2, 2, 2]), &[128, 256, 512]),
    ("resnet34", resnet(BlockKind::Basic, 64, [3, 4, 6, 3]), &[128, 256, 512]),
    ("resnet50_0375", resnet(BlockKind::Bottleneck, 24, [3, 4, 6, 3]), &[64, 128, 256]),
    ("resnet50_050", resnet(BlockKind::Bottleneck, 32, [3, 4, 6, 3]), &[64, 128, 256]),
    ("resnet50_0625", resnet(BlockKind::Bottleneck, 40, [3, 4, 6, 3]), &[128, 160, 192, 256]),
    ("resnet50_075", resnet(BlockKind::Bottleneck, 48, [3, 4, 6, 3]), &[128, 256]),
    ("resnet50", resnet(BlockKind::Bottleneck, 64, [3, 4, 6, 3]), &[64, 128, 256, 512]),
    ("mobilenetV3_0x5", mobilenet(2), &[128, 256, 512]),
    ("mobilenetV3_0x75", mobilenet(3), &[128, 256, 512]),
    ("mobilenetV3", mobilenet(4), &[128, 256, 512]),
    ("mobilenetV3_1x25", mobilenet(5), &[128, 256, 512]),
    ("mobilenetV3_1x5", mobilenet(6), &[128, 256, 512]),
    ("mobilenetV3_2x0", mobilenet(8), &[128, 256, 512]),
];

const fn regnet(widths: [i64; 4], depths: [usize; 4], group_width: i64) -> BackboneSpec {
    BackboneSpec::RegNet(RegNetSpec { widths, depths, group_width })
}

const fn resnet(block: BlockKind, width: i64, depths: [usize; 4]) -> BackboneSpec {
    BackboneSpec::ResNet(ResNetSpec { block, width, depths })
}

const fn mobilenet(quarters: i64) -> BackboneSpec {
    BackboneSpec::MobileNet(MobileNetSpec { quarters })
}

/// Finds a variant by its registered name.
pub(crate) fn variant(name: &str) -> Option<Variant> {
    let (backbone_name, tokens) = name.split_once("_perceiver_t")?;
    let (_, backbone, counts) = VARIANTS.iter().find(|(known, ..)| *known == backbone_name)?;
    let tokens = counts.iter().copied().find(|count| count.to_string() == tokens)?;
    Some(Variant { backbone: *backbone, tokens })
}

/// The names of all variants, in the order of the table.
pub fn variant_names() -> Vec<String> {
    let names_of = |(backbone, _, counts): &(&str, BackboneSpec, &[i64])| {
        counts.iter().map(|count| format!("{backbone}_perceiver_t{count}")).collect::<Vec<_>>()
    };
    VARIANTS.iter().flat_map(names_of).collect()
}
