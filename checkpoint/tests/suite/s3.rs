//! Checkpoints on a real S3 server: the same promises as in a folder, also when exchanges break.

use bytes::Bytes;
use checkpoint::{
    Checkpoint, Committed, Created, Fault, Retries, Store, commit, committed_steps, create, prune,
    quarantine, quarantined_steps, retrying, save_part, unfinished_steps,
};
use cluster::Step;
use futures::{TryStreamExt as _, future::join_all};
use testing::{Breakage, Proxy, Rule, S3Server};

use crate::fixture::{checkpoints, layout, manifest, save, state};

/// A store on the server, or on what listens on `port` in its place.
fn store(server: &S3Server, prefix: &str, port: Option<u16>) -> Store {
    let mut variables = server.variables();
    if let Some(port) = port {
        variables.push(("AWS_ENDPOINT_URL".to_owned(), format!("http://127.0.0.1:{port}")));
    }
    Store::open_with(&server.location(prefix), variables).unwrap()
}

async fn objects(store: &Store) -> Vec<String> {
    let listed: Vec<_> = store.objects().list(None).try_collect().await.unwrap();
    listed.into_iter().map(|object| object.location.to_string()).collect()
}

async fn whole(store: &Store, step: Step) -> Vec<u8> {
    let opened = Checkpoint::open(store, step).await.unwrap();
    let mut bytes = Vec::new();
    opened.read(&mut |_, part| bytes.extend_from_slice(part)).await.unwrap();
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_live_and_die_on_a_server_that_crashes_in_between() {
    let mut server = S3Server::start().await;
    let bucket = store(&server, "runs/one", None);
    bucket.check_contract().await.unwrap();
    assert_eq!(objects(&bucket).await, Vec::<String>::new(), "the check leaves nothing behind");

    checkpoints(&bucket, &[10, 20, 30]).await;
    server.crash_and_restart().await;

    let bucket = store(&server, "runs/one", None);
    assert_eq!(committed_steps(&bucket).await.unwrap(), [30, 20, 10].map(Step));
    // It lists before it has its data again, and says so.
    let opening = || Checkpoint::open(&bucket, Step(30));
    let opened = retrying(Retries::of("open a checkpoint"), opening).await.unwrap();
    retrying(Retries::of("verify a checkpoint"), || opened.verify()).await.unwrap();
    assert_eq!(whole(&bucket, Step(30)).await, state(Step(30)));
    // Saved by three, and again by two after a step was repeated: the same bytes.
    let parts = save(&bucket, Step(30), 2).await;
    let again = manifest(Step(30), parts, "second");
    assert_eq!(commit(&bucket, &again).await.unwrap(), Committed::Before);

    let neighbour = store(&server, "runs/on", None);
    assert_eq!(committed_steps(&neighbour).await.unwrap(), [], "a prefix ends at a slash");
    quarantine(&bucket, Step(30), "a test").await.unwrap();
    assert_eq!(committed_steps(&bucket).await.unwrap(), [20, 10].map(Step));
    assert_eq!(quarantined_steps(&bucket).await.unwrap(), [Step(30)]);
    save(&bucket, Step(15), 2).await;
    assert_eq!(unfinished_steps(&bucket).await.unwrap(), [Step(15)]);
    for step in [10, 15, 20, 30].map(Step) {
        prune(&bucket, step).await.unwrap();
    }
    assert_eq!(objects(&bucket).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_create_one_object_one_wins_and_all_learn_who() {
    let server = S3Server::start().await;
    let bucket = store(&server, "race", None);
    let attempts = (0..6_u8).map(|racer| {
        let bytes = Bytes::from(vec![racer; 32]);
        let bucket = bucket.clone();
        async move { (bytes.clone(), create(&bucket, "object", bytes).await.unwrap()) }
    });
    let outcomes = join_all(attempts).await;
    let winners: Vec<_> = outcomes.iter().filter(|(_, is)| *is == Created::Ours).collect();
    let [(winner, _)] = winners[..] else { panic!("{outcomes:?}") };
    for (_, outcome) in &outcomes {
        assert!(*outcome == Created::Ours || *outcome == Created::Before(winner.clone()));
    }
}

/// Saves and commits step 10 while `rule` holds, and wants it to be there as it should.
async fn survives(server: &S3Server, prefix: &str, rule: Rule) {
    let proxy = Proxy::before(server.port()).await;
    let broken = store(server, prefix, Some(proxy.port()));
    let name = format!("{prefix}: {rule:?}");
    proxy.add(rule);
    let step = Step(10);
    let (layout, state) = (layout(), state(step));
    let mut parts = Vec::new();
    for index in 0..layout.parts() {
        let range = layout.part_range(index);
        let bytes = &state[crate::fixture::in_memory(range)];
        let saving = || save_part(&broken, &layout, step, index, Bytes::copy_from_slice(bytes));
        parts.push(retrying(Retries::of("save a part"), saving).await.unwrap());
    }
    let manifest = manifest(step, parts, &name);
    let committing = || commit(&broken, &manifest);
    let committed = retrying(Retries::of("commit"), committing).await;
    assert_eq!(committed.unwrap(), Committed::Now, "{name}");
    assert_eq!(whole(&broken, step).await, state, "{name}");
    assert_eq!(proxy.left(), 0, "{name}: nothing was broken");

    let direct = store(server, prefix, None);
    assert_eq!(whole(&direct, step).await, state, "{name}");
    prune(&direct, step).await.unwrap();
    assert_eq!(objects(&direct).await, Vec::<String>::new(), "{name}: no partial objects");
}

#[tokio::test(flavor = "multi_thread")]
async fn exchanges_that_break_cost_attempts_and_no_checkpoint() {
    let server = S3Server::start().await;
    let puts =
        [Breakage::ResetBefore, Breakage::ResetAfter, Breakage::SlowDown, Breakage::SlowDownAfter];
    for path in ["part-00002", "manifest.json"] {
        for (case, breakage) in puts.into_iter().enumerate() {
            // Not named after the breakage: the client takes "SlowDown" in an answer for an error.
            let prefix = format!("{path}-{case}");
            survives(&server, &prefix, Rule { method: "PUT", path, breakage, times: 1 }).await;
        }
        let rule = Rule { method: "GET", path, breakage: Breakage::Corrupt, times: 1 };
        survives(&server, &format!("{path}-corrupt"), rule).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_is_always_read_with_other_bits_is_damaged_and_named() {
    let server = S3Server::start().await;
    let proxy = Proxy::before(server.port()).await;
    let broken = store(&server, "rot", Some(proxy.port()));
    checkpoints(&broken, &[10]).await;
    let path = "part-00003";
    proxy.add(Rule { method: "GET", path, breakage: Breakage::Corrupt, times: 2 });
    let opened = Checkpoint::open(&broken, Step(10)).await.unwrap();
    let error = opened.verify().await.unwrap_err();
    assert!(matches!(error.fault, Fault::PartDigest { .. }), "{error}");
    assert!(
        error.fault.to_string().contains("s3://test/rot/checkpoints/step-0000000010/part-00003")
    );
    opened.verify().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_and_a_missing_bucket_are_said_in_one_line() {
    let server = S3Server::start().await;
    let mut variables = server.variables();
    variables.push(("AWS_SECRET_ACCESS_KEY".to_owned(), "wrong".to_owned()));
    let locked = Store::open_with(&server.location("runs"), variables).unwrap();
    let error = locked.check_contract().await.unwrap_err().to_string();
    assert!(error.starts_with("cannot write s3://test/runs/probe/"), "{error}");
    assert!(error.contains("403 Forbidden") && error.len() < 200, "{error}");

    let elsewhere = Store::open_with("s3://no-such-bucket/runs", server.variables()).unwrap();
    let error = elsewhere.check_contract().await.unwrap_err().to_string();
    assert!(error.starts_with("cannot write s3://no-such-bucket/runs/"), "{error}");
    assert!(error.len() < 200, "{error}");
}
