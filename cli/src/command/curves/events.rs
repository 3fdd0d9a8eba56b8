//! TensorBoard's event files: protobuf messages in the frames of TFRecord.
//!
//! ```text
//! length u64 | masked crc32c of it u32 | message | masked crc32c of it u32      little-endian, one after the other
//! ```
//!
//! The messages are TensorFlow's `tensorflow.Event` (`core/util/event.proto`) and `Summary`
//! (`core/framework/summary.proto`), as far as scalars need them.

use cluster::{ExitScores, Timestamp};
use prost::Message;

use super::Course;

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since the Unix epoch.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    /// Of the first message of a file alone.
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// What TensorBoard takes for a file of events, of a run that began at this time.
pub(super) fn file_name(began: Timestamp) -> String {
    format!("events.out.tfevents.{:010}.percheron", began.0 / 1000)
}

/// A whole file: a scalar of each figure of each step and evaluation, in the order of time.
pub(super) fn file(began: Timestamp, course: &Course) -> Vec<u8> {
    let mut events = vec![(began, 0, Vec::new())];
    for (at, step, metrics) in &course.steps {
        let figures = vec![
            value("loss/loss", f64::from(metrics.loss)),
            value("opt/lr", metrics.learning_rate),
            value("opt/grad_norm", f64::from(metrics.gradient_norm)),
            value("perf/step_ms", f64::from(metrics.step_ms)),
        ];
        events.push((*at, step.0, figures));
    }
    for (at, evaluation) in &course.evaluations {
        let mut figures = scores("", &evaluation.weights);
        figures.extend(scores("_ema", &evaluation.ema));
        events.push((*at, evaluation.step.0, figures));
    }
    events.sort_by_key(|(at, step, _)| (*at, *step));
    let mut bytes = Vec::new();
    for (place, (at, step, figures)) in events.into_iter().enumerate() {
        let event = Event {
            wall_time: at.0 as f64 / 1000.0,
            step: step.cast_signed(),
            file_version: (place == 0).then(|| "brain.Event:2".to_owned()),
            summary: (place > 0).then_some(Summary { value: figures }),
        };
        frame(&event.encode_to_vec(), &mut bytes);
    }
    bytes
}

/// Under the names of the original's log.
fn scores(suffix: &str, scores: &ExitScores) -> Vec<Value> {
    let exits = ExitScores::EXITS.iter().zip(scores.top1);
    let mut values: Vec<Value> = exits
        .map(|(exit, top1)| value(&format!("perf/test_acc1_{exit}{suffix}"), top1 * 100.0))
        .collect();
    values.push(value(&format!("perf/test_loss{suffix}"), scores.loss));
    values
}

#[expect(clippy::cast_possible_truncation, reason = "a scalar of TensorBoard is an f32")]
fn value(tag: &str, value: f64) -> Value {
    Value { tag: tag.to_owned(), simple_value: Some(value as f32) }
}

/// Appends a record of TFRecord.
fn frame(message: &[u8], bytes: &mut Vec<u8>) {
    let length = (message.len() as u64).to_le_bytes();
    bytes.extend(length);
    bytes.extend(masked(crc32c::crc32c(&length)).to_le_bytes());
    bytes.extend(message);
    bytes.extend(masked(crc32c::crc32c(message)).to_le_bytes());
}

/// A checksum that may itself be part of what is checked (TensorFlow, `core/lib/hash/crc32c.h`).
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::curves::tests::course;

    /// The messages of a file whose frames are whole.
    fn read(mut bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at(12);
            let length =
                usize::try_from(u64::from_le_bytes(head[..8].try_into().unwrap())).unwrap();
            let (message, rest) = rest.split_at(length);
            for (checked, stored) in [(&head[..8], &head[8..]), (message, &rest[..4])] {
                let crc = crc32c::crc32c(checked);
                assert_eq!(stored, crc.rotate_right(15).wrapping_add(0xA282_EAD8).to_le_bytes());
            }
            events.push(Event::decode(message).unwrap());
            bytes = &rest[4..];
        }
        events
    }

    #[test]
    fn a_frame_is_to_the_byte_what_tensorflow_writes() {
        // The first record of any event file that TensorFlow wrote at second 0.
        let version = Event { file_version: Some("brain.Event:2".to_owned()), ..Event::default() };
        let mut bytes = Vec::new();
        frame(&version.encode_to_vec(), &mut bytes);
        assert_eq!(bytes[..8], 15_u64.to_le_bytes());
        assert_eq!(bytes[12..27], *b"\x1a\x0dbrain.Event:2");
        assert_eq!(masked(0xE306_9283), 0xC78A_B0E5, "of 123456789, by the definition");
    }

    #[test]
    fn each_step_is_there_once_and_a_zero_is_a_value() {
        let events = read(&file(Timestamp(500), &course()));
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        let losses: Vec<(i64, f32)> = events
            .iter()
            .flat_map(|event| event.summary.iter().map(move |summary| (event.step, summary)))
            .flat_map(|(step, summary)| summary.value.iter().map(move |value| (step, value)))
            .filter(|(_, value)| value.tag == "loss/loss")
            .map(|(step, value)| (step, value.simple_value.unwrap()))
            .collect();
        assert_eq!(losses, [(1, 3.0), (2, 2.5), (3, 0.0)]);
        let last = events.last().unwrap();
        assert_eq!((last.step, last.wall_time), (3, 3.5));
        let summary = last.summary.as_ref().unwrap();
        let merge = summary.value.iter().find(|value| value.tag == "perf/test_acc1_merge_ema");
        assert_eq!(merge.unwrap().simple_value, Some(25.0));
        assert_eq!(file_name(Timestamp(12_345)), "events.out.tfevents.0000000012.percheron");
    }
}
