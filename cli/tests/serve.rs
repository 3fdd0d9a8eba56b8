//! `percheron serve` on a run of one step, asked by real HTTP and gRPC clients.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::v1::{ClassifyRequest, inference_client::InferenceClient};
use reqwest::{Client, Method, StatusCode};
use serde_json::Value as Json;
use tonic::Code;

/// What a program says that must succeed.
fn said(folder: &Path, line: &str) -> String {
    let mut percheron = Command::new(env!("CARGO_BIN_EXE_percheron"));
    let output = percheron.current_dir(folder).args(line.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of a program that must fail.
fn refusal(folder: &Path, line: &str) -> String {
    let mut percheron = Command::new(env!("CARGO_BIN_EXE_percheron"));
    let output = percheron.current_dir(folder).args(line.split_whitespace()).output().unwrap();
    assert!(!output.status.success(), "{line}");
    String::from_utf8(output.stderr).unwrap()
}

/// A run of one step, its thresholds, and the digits as images.
fn begin(folder: &Path) {
    let sets = "--set max_steps=1 --set batch_size=2 --set evaluate_every_epochs=0";
    said(folder, &format!("up --recipe digits --run-dir run {sets}"));
    said(folder, "shards unpack builtin:digits --split val --out images");
    said(folder, "eval --checkpoint run --out evaluated");
}

/// The first images of a class, in the order in which `infer` tells them.
fn images(folder: &Path, count: usize) -> Vec<(String, Vec<u8>)> {
    let class = folder.join("images/val/7");
    let mut paths: Vec<PathBuf> =
        fs::read_dir(class).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    paths.iter().take(count).map(|path| (name(path), fs::read(path).unwrap())).collect()
}

/// What `infer` says of each image by itself.
fn inferred(folder: &Path, budget: Option<u32>, count: usize) -> Vec<Json> {
    let budget = budget.map_or_else(String::new, |budget| {
        format!("--budget {budget} --solved evaluated/eval.json")
    });
    let line = format!("infer images/val/7 --checkpoint run --json --batch 1 {budget}");
    let lines = said(folder, &line);
    lines.lines().take(count).map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The guesses of an answer in JSON.
fn guesses(top: &Json) -> Vec<(String, u32, f32)> {
    #[derive(serde::Deserialize)]
    struct Guess {
        class: String,
        index: u32,
        probability: f32,
    }
    let guesses: Vec<Guess> = serde_json::from_value(top.clone()).unwrap();
    guesses.into_iter().map(|guess| (guess.class, guess.index, guess.probability)).collect()
}

/// A server that is killed with its test.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(folder: &Path, options: &str) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_percheron"));
        command.current_dir(folder).stdout(Stdio::piped());
        command.args(["serve", "--checkpoint", "run", "--listen", "127.0.0.1:0"]);
        let mut process = command.args(options.split_whitespace()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().to_owned();
        assert!(address.starts_with("http://127.0.0.1:"), "{address:?}");
        Server { process, address }
    }

    fn ask(&self, client: &Client, path: &str, body: &[u8]) -> reqwest::RequestBuilder {
        client.post(format!("{}{path}", self.address)).body(body.to_vec())
    }

    async fn text(&self, client: &Client, path: &str) -> String {
        let response = client.get(format!("{}{path}", self.address)).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        response.text().await.unwrap()
    }

    async fn grpc(&self) -> InferenceClient<tonic::transport::Channel> {
        InferenceClient::connect(self.address.clone()).await.unwrap()
    }

    fn terminate(&mut self) -> ExitStatus {
        kill(Pid::from_raw(self.process.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        self.process.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok(); // It may have ended.
        self.process.wait().unwrap();
    }
}

async fn answered(request: reqwest::RequestBuilder) -> Json {
    let response = request.send().await.unwrap();
    let (status, text) = (response.status(), response.text().await.unwrap());
    assert_eq!(status, StatusCode::OK, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// Status and the one line of a request that must be refused.
async fn refused(request: reqwest::RequestBuilder) -> (u16, String) {
    let response = request.send().await.unwrap();
    let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
    let object: Json = serde_json::from_str(&text).unwrap();
    assert_eq!(object.as_object().unwrap().len(), 1, "{text}");
    let line = object["error"].as_str().unwrap().to_owned();
    assert!(!line.is_empty() && !line.contains('\n'), "{line:?}");
    (status, line)
}

/// A field of a metric's line, which must be there.
fn figure(metrics: &str, name: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in\n{metrics}")).parse().unwrap()
}

const ALONE: &str = "--solved evaluated/eval.json --delay-ms 0 --image-mib 1";

#[tokio::test]
async fn answers_are_those_of_infer_by_http_and_by_grpc() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    begin(folder);
    let server = Server::start(folder, ALONE);
    let (client, mut grpc) = (Client::new(), server.grpc().await);
    let images = images(folder, 6);
    for budget in [None, Some(0), Some(16)] {
        let path = budget.map_or_else(
            || "/v1/classify".to_owned(),
            |budget| format!("/v1/classify?budget={budget}&top=5"),
        );
        let expected = inferred(folder, budget, images.len());
        for ((name, image), expected) in images.iter().zip(expected) {
            assert!(expected["image"].as_str().unwrap().ends_with(name.as_str()));
            let answer = answered(server.ask(&client, &path, image)).await;
            for field in ["exit", "confidence", "top"] {
                assert_eq!(answer[field], expected[field], "{name}: {field}");
            }
            let budget_said =
                answer["budget"].as_u64().map(|budget| u32::try_from(budget).unwrap());
            assert_eq!(budget_said, budget);

            let request = ClassifyRequest { image: image.clone(), budget, top: Some(5) };
            let by_grpc = grpc.classify(request).await.unwrap().into_inner();
            assert_eq!(by_grpc.exit, expected["exit"]);
            let top = by_grpc.top.iter();
            let said = top.map(|guess| (guess.class.clone(), guess.index, guess.probability));
            assert_eq!(said.collect::<Vec<_>>(), guesses(&expected["top"]), "{name}");
            assert_eq!(Json::from(by_grpc.macs), answer["macs"]);
        }
    }
    let metrics = server.text(&client, "/metrics").await;
    let http = r#"percheron_serve_requests_total{face="http",outcome="answered"}"#;
    assert!((figure(&metrics, http) - 18.0).abs() < 1e-9, "{metrics}");
    assert!((figure(&metrics, "percheron_serve_batch_images_count") - 36.0).abs() < 1e-9);
    assert!(figure(&metrics, r#"percheron_serve_exits_total{exit="merge"}"#) >= 12.0);
    for phase in ["decode", "wait", "network"] {
        let name = format!("percheron_serve_phase_duration_seconds_count{{phase=\"{phase}\"}}");
        assert!((figure(&metrics, &name) - 36.0).abs() < 1e-9, "{metrics}");
    }
    assert_eq!(server.text(&client, "/healthz").await, "ok\n");
    for asset in ["/", "/serve.js", "/serve.css"] {
        let text = server.text(&client, asset).await;
        assert!(
            !text.contains("http:") && !text.contains("https:"),
            "{asset} loads from elsewhere"
        );
    }
}

#[tokio::test]
async fn a_batch_of_several_budgets_is_answered_as_each_alone() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    begin(folder);
    // No batch goes before it is full, so these four make one.
    let options = "--solved evaluated/eval.json --batch 4 --delay-ms 600000 --patience-s 600";
    let server = Server::start(folder, options);
    let client = Client::new();
    let budgets = [Some(0), Some(8), Some(32), None];
    let asked = images(folder, 4).into_iter().zip(budgets).map(|((_, image), budget)| {
        let path = budget.map_or_else(
            || "/v1/classify".to_owned(),
            |budget| format!("/v1/classify?budget={budget}"),
        );
        tokio::spawn(answered(server.ask(&client, &path, &image)))
    });
    for (row, (asked, budget)) in asked.collect::<Vec<_>>().into_iter().zip(budgets).enumerate() {
        let (answer, alone) = (asked.await.unwrap(), &inferred(folder, budget, 4)[row]);
        assert_eq!(answer["batch"], 4);
        assert_eq!(answer["exit"], alone["exit"], "image {row}");
        assert_eq!(answer["top"][0]["index"], alone["top"][0]["index"], "image {row}");
        let sure = |answer: &Json| answer["confidence"].as_f64().unwrap();
        assert!((sure(&answer) - sure(alone)).abs() < 1e-5, "image {row}");
    }
}

#[tokio::test]
async fn bad_input_is_refused_with_one_line() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    begin(folder);
    let server = Server::start(folder, ALONE);
    let (client, mut grpc) = (Client::new(), server.grpc().await);
    let (_, image) = &images(folder, 1)[0];
    let classify = "/v1/classify";
    let long = vec![0; (1 << 20) + 1];
    let mut dot = Vec::new();
    let mut pixel = png::Encoder::new(&mut dot, 1, 1);
    pixel.set_color(png::ColorType::Rgb);
    pixel.write_header().unwrap().write_image_data(&[1, 2, 3]).unwrap();
    let rows: [(&str, &[u8], u16, &str); 12] = [
        (classify, b"no image", 400, "it is neither JPEG nor PNG"),
        (classify, b"\xFF\xD8\xFF", 400, "damaged JPEG"),
        (classify, b"\x89PNG\r\n", 400, "damaged PNG"),
        (classify, &dot, 400, "single pixel"),
        (classify, b"", 400, "there is no image"),
        (classify, &long, 413, "at most 1048576 bytes"),
        ("/v1/classify?budget=33", image, 400, "budget=33: it must be a whole number from 0"),
        ("/v1/classify?budget=-1", image, 400, "budget=-1: it must be a whole number from 0"),
        ("/v1/classify?budget=cheap", image, 400, "budget=cheap: it must be"),
        ("/v1/classify?top=0", image, 400, "top=0: it must be a whole number from 1"),
        ("/v1/classify?bugdet=3", image, 400, "there is no parameter bugdet"),
        ("/v1/clasify", image, 404, "/v1/clasify: there is nothing"),
    ];
    for (path, body, status, words) in rows {
        let (found, line) = refused(server.ask(&client, path, body)).await;
        assert!(found == status && line.contains(words), "{path}: {found} {line}");
    }
    for (method, path) in
        [(Method::GET, classify), (Method::PUT, classify), (Method::POST, "/healthz")]
    {
        let request = client.request(method.clone(), format!("{}{path}", server.address));
        let (status, line) = refused(request).await;
        assert!(
            status == 405 && line.starts_with(&format!("{method} {path}: ")),
            "{status} {line}"
        );
    }
    let ask = |image: &[u8], budget| ClassifyRequest { image: image.to_vec(), budget, top: None };
    for (request, code, words) in [
        (ask(b"no image", None), Code::InvalidArgument, "neither JPEG nor PNG"),
        (ask(image, Some(33)), Code::InvalidArgument, "budget=33"),
        (ask(&long, None), Code::ResourceExhausted, "at most 1048576 bytes"),
        (ask(&[0; 2 << 20], None), Code::OutOfRange, "too large"),
    ] {
        let status = grpc.classify(request).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(words), "{status:?}");
    }
    let metrics = server.text(&client, "/metrics").await;
    let bad = r#"percheron_serve_requests_total{face="http",outcome="bad_input"}"#;
    assert!((figure(&metrics, bad) - 10.0).abs() < 1e-9, "{metrics}");
    assert!((figure(&metrics, "percheron_serve_requests_under_way")).abs() < 1e-9, "{metrics}");

    for (line, words) in [
        ("--listen 0.0.0.0:0", "only this machine may reach it"),
        ("--listen 127.0.0.1:0 --solved nowhere.json", "--solved nowhere.json"),
        ("--listen 127.0.0.1:0 --budget 33", "33"),
    ] {
        let said = refusal(folder, &format!("serve --checkpoint run {line}"));
        assert!(said.contains(words), "{line}: {said}");
    }
}

#[tokio::test]
async fn a_full_server_says_so_and_one_that_ends_answers_those_who_wait() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    begin(folder);
    // Two wait for a third, for which there is no place.
    let options = "--no-budgets --batch 3 --waiting 2 --delay-ms 600000 --patience-s 600";
    let mut server = Server::start(folder, options);
    let client = Client::new();
    let (_, image) = &images(folder, 1)[0];
    let (_, line) = refused(server.ask(&client, "/v1/classify?budget=3", image)).await;
    assert!(line.contains("--no-budgets"), "{line}");

    let wait = || tokio::spawn(answered(server.ask(&client, "/v1/classify", image)));
    let waiting = [wait(), wait()];
    let full = loop {
        let metrics = server.text(&client, "/metrics").await;
        if figure(&metrics, "percheron_serve_requests_under_way") > 1.5 {
            break server.ask(&client, "/v1/classify", image);
        }
    };
    let (status, line) = refused(full).await;
    assert!(status == 503 && line.starts_with("2 requests are under way"), "{status} {line}");
    let request = ClassifyRequest { image: image.clone(), budget: None, top: None };
    let by_grpc = server.grpc().await.classify(request).await.unwrap_err();
    assert_eq!(by_grpc.code(), Code::Unavailable, "{by_grpc:?}");

    let ended = tokio::task::spawn_blocking(move || server.terminate());
    for waiting in waiting {
        let answer = waiting.await.unwrap();
        assert_eq!(answer["exit"], "merge");
    }
    assert!(ended.await.unwrap().success());
}
