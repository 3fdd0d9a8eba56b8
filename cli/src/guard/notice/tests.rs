//! A fake of each cloud's server, as its documentation describes it.

use std::{collections::VecDeque, sync::Arc};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::Mutex,
};

use super::*;

/// What is wanted of a request, by the words of its head, and what is answered.
type Turn = (&'static [&'static str], u16, &'static str);

/// Plays `turns` in order; returns where.
async fn server(turns: &[Turn]) -> (String, Arc<Mutex<VecDeque<Turn>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let turns = Arc::new(Mutex::new(turns.iter().copied().collect::<VecDeque<_>>()));
    let left = Arc::clone(&turns);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap().to_lowercase();
            let (wanted, status, body) = turns.lock().await.pop_front().unwrap();
            let as_wanted = wanted.iter().all(|word| head.contains(&word.to_lowercase()));
            let (status, body) = if as_wanted { (status, body) } else { (400, head.as_str()) };
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (url, left)
}

/// Asks `questions` times; returns the last answer. All turns must have been played by then.
async fn answer(cloud: Cloud, turns: &[Turn], questions: usize) -> Result<Option<String>> {
    let (base, left) = server(turns).await;
    let mut metadata = Metadata { client: Client::new(), base, token: None };
    let mut last = Ok(None);
    for _ in 0..questions {
        last = metadata.ask(cloud).await;
    }
    assert!(left.lock().await.is_empty(), "{last:?}");
    last
}

const TOKEN: Turn =
    (&["put /latest/api/token", "x-aws-ec2-metadata-token-ttl-seconds: 21600"], 200, "secret");
const ACTION: &[&str] =
    &["get /latest/meta-data/spot/instance-action", "x-aws-ec2-metadata-token: secret"];
const EVENTS: &[&str] = &["get /metadata/scheduledevents?api-version=2020-07-01", "metadata: true"];
const PREEMPTED: &[&str] =
    &["get /computemetadata/v1/instance/preempted", "metadata-flavor: google"];
const MAINTENANCE: &[&str] =
    &["get /computemetadata/v1/instance/maintenance-event", "metadata-flavor: google"];

#[tokio::test]
async fn aws_has_no_notice_until_the_instance_is_to_be_interrupted() {
    let turns: &[Turn] = &[
        TOKEN,
        (ACTION, 404, ""),
        (ACTION, 200, r#"{"action": "terminate", "time": "2026-11-24T08:22:00Z"}"#),
    ];
    let notice = answer(Cloud::Aws, turns, 2).await.unwrap().unwrap();
    assert_eq!(notice, "EC2 will terminate this instance at 2026-11-24T08:22:00Z");
}

#[tokio::test]
async fn aws_gives_a_new_token_for_one_that_is_too_old() {
    let turns: &[Turn] = &[TOKEN, (ACTION, 401, ""), TOKEN, (ACTION, 404, "")];
    assert_eq!(answer(Cloud::Aws, turns, 2).await.unwrap(), None);
}

#[tokio::test]
async fn gcp_says_true_or_names_the_maintenance() {
    let turns: &[Turn] =
        &[(PREEMPTED, 200, "FALSE"), (MAINTENANCE, 200, "NONE"), (PREEMPTED, 200, "TRUE\n")];
    assert!(answer(Cloud::Gcp, turns, 2).await.unwrap().unwrap().contains("preempts"));
    let turns: &[Turn] =
        &[(PREEMPTED, 200, "FALSE"), (MAINTENANCE, 200, "TERMINATE_ON_HOST_MAINTENANCE")];
    assert!(answer(Cloud::Gcp, turns, 1).await.unwrap().unwrap().contains("maintenance"));
    let turns: &[Turn] =
        &[(PREEMPTED, 200, "FALSE"), (MAINTENANCE, 200, "MIGRATE_ON_HOST_MAINTENANCE")];
    assert_eq!(answer(Cloud::Gcp, turns, 1).await.unwrap(), None, "it will go on elsewhere");
}

#[tokio::test]
async fn azure_lists_events_of_which_some_end_the_machine() {
    let freeze =
        r#"{"DocumentIncarnation": 1, "Events": [{"EventId": "a", "EventType": "Freeze"}]}"#;
    let preempt =
        r#"{"Events": [{"EventType": "Preempt", "NotBefore": "Tue, 24 Nov 2026 08:22:00 GMT"}]}"#;
    let turns: &[Turn] =
        &[(EVENTS, 200, r#"{"Events": []}"#), (EVENTS, 200, freeze), (EVENTS, 200, preempt)];
    let notice = answer(Cloud::Azure, turns, 3).await.unwrap().unwrap();
    assert_eq!(notice, "Azure: Preempt not before Tue, 24 Nov 2026 08:22:00 GMT");
}

#[tokio::test]
async fn an_answer_that_is_no_notice_is_an_error_and_no_notice() {
    let nonsense: &[Turn] = &[TOKEN, (ACTION, 200, "<html>")];
    let error = answer(Cloud::Aws, nonsense, 1).await.unwrap_err();
    assert!(format!("{error:#}").contains("is no notice"), "{error:#}");
    assert!(answer(Cloud::Gcp, &[(PREEMPTED, 500, "")], 1).await.is_err());
}

#[tokio::test]
async fn a_notice_reaches_who_waits_for_it() {
    let (url, _) = server(&[(PREEMPTED, 200, "TRUE")]).await;
    let mut watch = watch(Cloud::Gcp, Some(&url)).unwrap();
    assert!(watch.next().await.contains("preempts"));
}
