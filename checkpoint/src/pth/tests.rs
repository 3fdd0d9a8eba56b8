//! Reading and writing, damage, and what must never be called.

use std::io::Write as _;

use zip::{ZipWriter, write::SimpleFileOptions};

use super::*;

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

fn dict(items: Vec<(&str, Value)>) -> Value {
    Value::Dict(items.into_iter().map(|(key, value)| (text(key), value)).collect())
}

fn sample() -> Value {
    let state = dict(vec![
        ("w", Value::Array(Array::f32(&[2, 3], &[1.0, -2.0, 3.5, f32::MIN_POSITIVE, 0.0, -0.0]))),
        ("n", Value::Array(Array::i64_scalar(375_300))),
        ("empty", Value::Array(Array::f32(&[0, 3], &[]))),
    ]);
    dict(vec![
        ("model", state),
        ("epoch", Value::Int(299)),
        ("far", Value::Int(-(1 << 40))),
        ("lr", Value::Float(1e-3)),
        ("flags", Value::List(vec![Value::Bool(true), Value::None, Value::Bytes(vec![0, 255])])),
    ])
}

/// An archive with a pickle of the test's own.
fn archive(pickle: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut archive = ZipWriter::new(file.reopen().unwrap());
    archive.start_file("x/data.pkl", SimpleFileOptions::default()).unwrap();
    archive.write_all(pickle).unwrap();
    archive.finish().unwrap();
    file
}

#[test]
fn what_is_written_is_read_back_and_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    write(&path, &sample()).unwrap();
    assert_eq!(read(&path).unwrap(), sample());
    let before = std::fs::read(&path).unwrap();
    assert!(write(&path, &Value::None).unwrap_err().fault.to_string().contains("exists"));
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn nothing_is_called_that_is_not_known() {
    // os.system("true")
    let evil = archive(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.");
    let error = read(evil.path()).unwrap_err().fault;
    assert!(matches!(&error, PthFault::Refused { name } if name == "os system"), "{error}");
    let object = archive(b"\x80\x02csome\nClass\n)\x81.");
    assert!(matches!(read(object.path()).unwrap_err().fault, PthFault::Refused { .. }));
    let named = archive(b"\x80\x02cos\nsystem\n.");
    assert!(matches!(read(named.path()).unwrap_err().fault, PthFault::Refused { .. }));
}

#[test]
fn the_settings_of_a_script_are_kept_as_attributes() {
    let settings = archive(b"\x80\x02cargparse\nNamespace\n)\x81}X\x02\x00\x00\x00lrK\x07sb.");
    assert_eq!(read(settings.path()).unwrap(), dict(vec![("lr", Value::Int(7))]));
}

#[test]
fn a_list_that_holds_itself_is_refused() {
    let circle = archive(b"\x80\x02]q\x00h\x00a.");
    assert!(matches!(read(circle.path()).unwrap_err().fault, PthFault::TooDeep));
}

#[test]
fn damage_is_an_error_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, cut) = (folder.path().join("whole.pth"), folder.path().join("cut.pth"));
    write(&whole, &sample()).unwrap();
    let bytes = std::fs::read(&whole).unwrap();
    for length in (0..bytes.len()).step_by(7) {
        std::fs::write(&cut, &bytes[..length]).unwrap();
        assert!(read(&cut).is_err(), "{length} of {} bytes", bytes.len());
    }
    let pickle = b"\x80\x02}(X\x01\x00\x00\x00aK\x01u.";
    for at in 0..pickle.len() {
        for byte in 0..=255 {
            let mut changed = pickle.to_vec();
            changed[at] = byte;
            drop(pickle::read(&changed)); // Right or wrong, it returns.
        }
    }
    std::fs::write(&cut, b"\x80\x02}q\x00.").unwrap();
    assert!(matches!(read(&cut).unwrap_err().fault, PthFault::NotZip));
}

#[test]
fn the_reference_sample_is_read_as_its_description_says() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference/golden");
    let file = golden.join("checkpoint_sample.pth");
    if !file.is_file() {
        println!("not checked: the reference's goldens do not lie beside this checkout");
        return;
    }
    let description = std::fs::read(golden.join("checkpoint_sample.json")).unwrap();
    let description: serde_json::Value = serde_json::from_slice(&description).unwrap();
    let value = read(&file).unwrap();
    assert_eq!(value.get("epoch"), Some(&Value::Int(299)));
    assert_eq!(value.get("args").unwrap().get("with_kd"), Some(&Value::Bool(true)));
    for section in ["model", "model_ema"] {
        let arrays = value.get(section).unwrap().arrays().unwrap();
        let expected = description[section].as_array().unwrap();
        assert_eq!(arrays.len(), expected.len());
        for ((name, array), expected) in arrays.into_iter().zip(expected) {
            assert_eq!(name, expected[0]);
            assert_eq!(serde_json::json!(array.shape), expected[1], "{name}");
            let sum: f64 = match array.to_i64() {
                Some(value) => value as f64,
                None => array.to_f32().unwrap().into_iter().map(f64::from).sum(),
            };
            let expected = expected[3].as_f64().unwrap();
            assert!((sum - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{name}: {sum}");
        }
    }
}
