//! Parity with the reference pipeline (Pillow 9.5, torchvision, timm), to the bit.
//!
//! The reference values are not part of this repository. They are looked for beside it; without them
//! this prints why it checked nothing, and the tests inside the modules stand alone.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::path::Path;

mod checks;

use checks::{COMPANIONS, FILES};

#[test]
fn every_case_of_the_reference_is_met_to_the_bit() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference/golden");
    let there = |name: &&str| folder.join(name).is_file();
    if !FILES.iter().chain(&COMPANIONS).all(there) {
        println!("nothing checked: the reference's numbers are not beside the repository");
        return;
    }
    let checks = checks::examine(&folder);
    for check in &checks {
        assert!(check.failed.is_empty(), "{}, {}: {:?}", check.file, check.name, check.failed);
    }
    let counts: Vec<usize> = checks.iter().map(|check| check.cases).collect();
    assert_eq!(counts, [30, 6, 5, 330, 252, 5, 2, 7, 8, 8]);
}
