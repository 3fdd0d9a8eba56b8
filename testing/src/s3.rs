//! An S3 server: `SeaweedFS`, which is durable, checks signatures and writes conditionally.

use std::{
    env,
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use object_store::{
    ClientOptions, ObjectStoreExt as _, Result, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    path::Path as ObjectPath,
};
use tempfile::TempDir;

/// As `cargo xtask setup` installs it.
const PROGRAM: &str = "weed";
const VERSION: &str = "4.48";
const BUCKET: &str = "test";
const KEY: &str = "test-key";
const SECRET: &str = "test-secret";
const REGION: &str = "us-east-1";
/// It starts in two seconds on an idle machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Its first writes can hang while it makes room for them on a busy machine.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(50);

/// A server with one empty bucket. Dropping it ends the server and deletes what it kept.
#[derive(Debug)]
pub struct S3Server {
    folder: TempDir,
    ports: [u16; 10],
    process: Child,
}

impl S3Server {
    /// Starts a server and waits until it serves.
    ///
    /// # Panics
    /// If the program is not there, or does not serve within a minute: with what it wrote.
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let ports = free_ports();
        let process = launch(folder.path(), &ports);
        let mut server = Self { folder, ports, process };
        server.serving().await;
        server
    }

    /// Kills the server without warning, and starts it again on what it has on disk.
    ///
    /// # Panics
    /// As [`S3Server::start`].
    pub async fn crash_and_restart(&mut self) {
        self.end();
        self.process = launch(self.folder.path(), &self.ports);
        self.serving().await;
    }

    /// The location `s3://BUCKET/prefix`.
    #[must_use]
    pub fn location(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// What a client has in its environment.
    #[must_use]
    pub fn variables(&self) -> Vec<(String, String)> {
        let endpoint = self.endpoint();
        let variables = [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_ACCESS_KEY_ID", KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", REGION),
        ];
        variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    /// The port that S3 is spoken on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.ports[0]
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port())
    }

    /// Waits until an object can be written, read and deleted: the server answers long before it can.
    async fn serving(&mut self) {
        let client = AmazonS3Builder::new()
            .with_client_options(ClientOptions::new().with_timeout(ATTEMPT_TIMEOUT))
            .with_endpoint(self.endpoint())
            .with_allow_http(true)
            .with_region(REGION)
            .with_access_key_id(KEY)
            .with_secret_access_key(SECRET)
            .with_bucket_name(BUCKET)
            .with_retry(RetryConfig { max_retries: 0, ..Default::default() })
            .build()
            .expect("the client's settings are whole");
        let answers = async {
            while try_out(&client).await.is_err() {
                let ended = self.process.try_wait().expect("the server is our child");
                assert!(ended.is_none(), "{PROGRAM} has ended: {}", self.said());
                tokio::time::sleep(POLL).await;
            }
        };
        let served = tokio::time::timeout(START_TIMEOUT, answers).await;
        assert!(served.is_ok(), "{PROGRAM} does not serve: {}", self.said());
    }

    /// The end of its log.
    fn said(&self) -> String {
        let log = fs::read_to_string(log(self.folder.path())).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(5).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    fn end(&mut self) {
        // One that has ended by itself is no trouble.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.end();
    }
}

async fn try_out(client: &AmazonS3) -> Result<()> {
    let object = ObjectPath::from("is-it-ready");
    client.put(&object, "yes".into()).await?;
    client.get(&object).await?.bytes().await?;
    client.delete(&object).await
}

fn launch(folder: &Path, ports: &[u16; 10]) -> Child {
    let identities = folder.join("identities.json");
    let actions = r#"["Admin","Read","Write","List","Tagging"]"#;
    let credentials = format!(r#"[{{"accessKey":"{KEY}","secretKey":"{SECRET}"}}]"#);
    let identity = format!(r#"{{"name":"test","credentials":{credentials},"actions":{actions}}}"#);
    fs::write(&identities, format!(r#"{{"identities":[{identity}]}}"#))
        .expect("the folder can be written to");
    let data = folder.join("data");
    fs::create_dir_all(&data).expect("the folder can be written to");
    let log = File::create(log(folder)).expect("the folder can be written to");
    let copy = log.try_clone().expect("a file can be shared");

    let services = [
        "s3.port",
        "s3.port.grpc",
        "master.port",
        "master.port.grpc",
        "volume.port",
        "volume.port.grpc",
        "filer.port",
        "filer.port.grpc",
        "admin.port",
        "admin.port.grpc",
    ];
    let mut weed = Command::new(program());
    weed.args(["-logtostderr=true", "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]);
    weed.args(services.iter().zip(ports).map(|(service, port)| format!("-{service}={port}")));
    weed.args(["-master.telemetry=false", "-admin.ui=false", "-webdav=false"]);
    weed.args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]);
    weed.arg(format!("-bucket={BUCKET}"));
    weed.arg(format!("-dir={}", data.display()));
    weed.arg(format!("-s3.config={}", identities.display()));
    for service in ["filer", "s3"] {
        weed.arg(format!("-{service}.localSocket={}", folder.join(service).display()));
    }
    weed.stdin(Stdio::null()).stdout(log).stderr(copy);
    weed.spawn().unwrap_or_else(|error| {
        panic!("no {PROGRAM}, which is an S3 server ({error}): `cargo xtask setup` installs it")
    })
}

fn log(folder: &Path) -> PathBuf {
    folder.join("log")
}

/// On the search path, or where `cargo xtask setup` puts programs.
fn program() -> PathBuf {
    let set = env::var_os("PERCHERON_CACHE").map(PathBuf::from);
    let users = || env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = set.or_else(|| Some(users().or_else(home)?.join("percheron")));
    let installed = cache.unwrap_or_default().join(format!("tools/{PROGRAM}-{VERSION}/{PROGRAM}"));
    if installed.is_file() { installed } else { PathBuf::from(PROGRAM) }
}

/// Ports that nobody listens on. All are held until the last is found, so they differ.
fn free_ports() -> [u16; 10] {
    let listeners = [(); 10].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port is free"));
    listeners.map(|listener| listener.local_addr().expect("it listens").port())
}
